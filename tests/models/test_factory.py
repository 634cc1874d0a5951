import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from nets import handwritten
from nets.handwritten import walk
from safetensors.torch import save_file
from torch import Tensor, nn

from tfmq_export import Description
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load


def trained_state() -> dict[str, Tensor]:
    """Weights that no factory builds by itself."""
    module, _ = handwritten.build_edm()
    return {name: value + 0.5 for name, value in module.state_dict().items()}


def save_pt(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def save_checkpoint(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "step": 7}, path)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("weights.pt", save_pt), ("checkpoint.pt", save_checkpoint), ("weights.safetensors", save_safetensors)],
)
def test_a_factory_gets_its_weights_from_the_file(name: str, save: Callable, tmp_path: Path) -> None:
    state = trained_state()
    save(state, tmp_path / name)

    denoiser = load(Source(path=tmp_path / name, factory="nets.handwritten:build_edm"))

    loaded = denoiser.module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert (denoiser.sample, denoiser.timestep, denoiser.source) == ("noisy", "sigma", name)
    assert denoiser.timesteps.real
    assert len(denoiser.timesteps) == 5
    assert not denoiser.module.training
    assert not any(parameter.requires_grad for parameter in denoiser.module.parameters())


def test_a_factory_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from nets.handwritten import build_edm\n\ndef make():\n    return build_edm()\n"
    (tmp_path / "my_model_of_this_test.py").write_text(code)
    save_pt(trained_state(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)

    assert load(Source(path=Path("w.pt"), factory="my_model_of_this_test:make")).sample == "noisy"


def test_what_a_factory_returns_may_import_its_neighbours_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neighbour_of_this_test.py").write_text("from nets.handwritten import build_edm\n")
    code = "def make():\n    from neighbour_of_this_test import build_edm\n    return build_edm()\n"
    (tmp_path / "late_model_of_this_test.py").write_text(code)
    save_pt(trained_state(), tmp_path / "w.pt")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # puts sys.path back at the end
    monkeypatch.chdir(tmp_path)

    assert load(Source(path=Path("w.pt"), factory="late_model_of_this_test:make")).sample == "noisy"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "def make():\n    raise RuntimeError('no such size')",
            r"it raises RuntimeError: no such size \(theirs.py:2\)",
        ),
        ("def make():\n    return 1 / 0", r"it raises ZeroDivisionError: division by zero \(theirs.py:2\)"),
        ("raise KeyError('at import')", r"importing theirs raises KeyError: 'at import' \(theirs.py:1\)"),
        ("def make(:", r"importing theirs raises SyntaxError: invalid syntax"),
    ],
)
def test_what_a_factory_raises_is_shown_as_its_own(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(code)
    save_pt(trained_state(), tmp_path / "w.pt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)

    with pytest.raises(LoadError, match=says):
        load(Source(path=tmp_path / "w.pt", factory="theirs:make"))


def test_what_a_sampler_raises_is_shown_as_its_own() -> None:
    def sampler(denoise: object, noise: Tensor, conditioning: object) -> Tensor:
        raise IndexError("past the last sigma")

    module, right = handwritten.build_edm()
    denoiser = describe(module, replace(right, sampler=sampler), None, "edm")

    with pytest.raises(LoadError, match=r"edm: the sampler raises IndexError: past the last sigma \(test_factory.py:"):
        denoiser.runs(1, 0)[0](denoiser.module_denoise())


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("handwritten", ConfigError, "expected package.module:function"),
        ("nets.handwritten:build_nothing", ConfigError, "build_nothing"),
        ("no_such_package:build", ConfigError, "no_such_package.*run from the folder"),
        ("nets.handwritten:captured.cache_clear", ConfigError, "captured.cache_clear"),
        ("nets.handwritten:EdmSignal", LoadError, "must return"),
        ("os:system", ConfigError, "not a function that builds a model; write one without arguments"),
        ("os:getcwd", ConfigError, "not a function that builds a model"),
        ("sys:path", ConfigError, "not a function that builds a model"),
        ("shutil:rmtree", ConfigError, "not a function that builds a model"),
        (":build", ConfigError, "expected package.module:function"),
        ("..:build", ConfigError, "expected package.module:function"),
    ],
)
def test_a_wrong_factory_is_named(factory: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    save_pt(trained_state(), tmp_path / "w.pt")

    with pytest.raises(error, match=message):
        load(Source(path=tmp_path / "w.pt", factory=factory))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_pt(trained_state(), tmp_path / "w.pt")

    with pytest.raises(LoadError, match="another architecture"):
        load(Source(path=tmp_path / "w.pt", factory="nets.handwritten:build_dit"))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_of_noise_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02no weights at all")

    with pytest.raises(LoadError, match=name):
        load(Source(path=tmp_path / name, factory="nets.handwritten:build_edm"))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"gone\.pt: no such file"):
        load(Source(path=tmp_path / "gone.pt", factory="nets.handwritten:build_edm"))


def test_steps_other_than_the_samplers_own_are_refused(tmp_path: Path) -> None:
    save_pt(trained_state(), tmp_path / "w.pt")

    with pytest.raises(ConfigError, match="--steps 9, but your own sampler's schedule has 5"):
        load(Source(path=tmp_path / "w.pt", factory="nets.handwritten:build_edm", steps=9))


X, T, Y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.5]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": "x"}, "Description.sample is 'x', but example_inputs has z, t, y"),
        ({"timestep": "time"}, "Description.timestep is 'time', but example_inputs has z, t, y"),
        ({"example_inputs": {"z": X[:1], "t": T[:1], "y": Y[:1]}}, "batch of 2"),
        ({"example_inputs": {"z": X, "t": T, "y": Y[:1]}}, "y has a batch of 1"),
        ({"example_inputs": {"z": X, "t": T.reshape(2, 1, 1, 1), "y": Y}}, r"timestep has shape \[2, 1, 1, 1\]"),
        ({"conditioning": {}}, "Description.conditioning has no examples of y"),
        ({"conditioning": {"y": Y, "mask": Y}}, "Description.conditioning names mask, not among"),
        ({"conditioning": {"y": Y.float()}}, "conditioning of y is float32"),
        ({"conditioning": {"y": Y[:, None]}}, r"conditioning of y is int64 \[2, 1\]"),
        ({"unconditional": {"label": Y[0]}}, "Description.unconditional names label"),
        ({"unconditional": {"y": Y}}, r"unconditional value of y is \[2\]"),
        ({"sampler": None}, "Description.sampler must be"),
        ({"timesteps": None}, "Description.timesteps is needed with your own sampler"),
        ({"timesteps": [999, 500]}, "schedule has integer timesteps, but the example timestep is float"),
        ({"timesteps": [0.5, 0.5]}, "repeats a value"),
        ({"timesteps": []}, "at least one timestep"),
        ({"timesteps": [float("nan"), 0.5]}, "must be finite"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_each_wrong_field_of_a_description_has_its_own_message(change: dict[str, object], message: str) -> None:
    module, right = handwritten.build_dit()
    describe(module, right, None, "dit")

    with pytest.raises(ConfigError, match=message):
        describe(module, replace(right, **change), None, "dit")


def test_something_else_than_a_description_is_refused() -> None:
    module, _ = handwritten.build_dit()

    with pytest.raises(ConfigError, match=r"expected a tfmq_export\.Description \(example_inputs, .*got dict"):
        describe(module, {"sample": "z"}, None, "dit")  # type: ignore[arg-type]  # refused: the point


def test_a_diffusers_scheduler_brings_its_own_timesteps() -> None:
    module, right = handwritten.build_film_unet()
    given = Description(right.example_inputs, DDIMScheduler(), sample="x", timestep="time")

    denoiser = describe(module, given, 4, "film")

    assert denoiser.timesteps.values == (750, 500, 250, 0)
    assert denoiser.sampler_info.kind == "DDIMScheduler"
    assert denoiser.scheduler_config is not None


def test_timesteps_the_scheduler_does_not_visit_are_refused() -> None:
    module, right = handwritten.build_film_unet()

    with pytest.raises(ConfigError, match="are not the ones DDIMScheduler visits"):
        describe(module, replace(right, sampler=DDIMScheduler()), None, "film")


class Caught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, **rest: Tensor) -> Tensor:
        return self.layer(sample) + rest["label"].float()[:, None, None, None]


def test_an_input_that_forward_does_not_name_is_refused() -> None:
    inputs = {"sample": torch.zeros(2, 3, 8, 8), "timestep": torch.tensor([3, 1]), "label": torch.tensor([0, 1])}
    described = Description(inputs, walk([3, 1]), timesteps=[3, 1], conditioning={"label": torch.arange(3)})

    with pytest.raises(ConfigError, match=r"Caught\.forward\(\) takes label through \*\*rest.*name each input"):
        describe(Caught(), described, None, "caught")


def test_a_factory_may_have_loaded_the_weights_itself() -> None:
    denoiser = load(Source(None, factory="nets.handwritten:build_edm"))

    built, _ = handwritten.build_edm()
    assert denoiser.source == "nets.handwritten:build_edm"
    for name, value in built.state_dict().items():
        assert torch.equal(denoiser.module.state_dict()[name], value)


def test_without_a_file_there_is_no_variant_of_it() -> None:
    with pytest.raises(ConfigError, match="no file was given"):
        load(Source(None, factory="nets.handwritten:build_edm", variant="raw"))
    with pytest.raises(ConfigError, match="no model: give its folder"):
        load(Source(None))
