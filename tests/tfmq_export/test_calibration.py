from pathlib import Path

import pytest
import torch
from handwritten import CLASSES, captured, denoiser_of, probe
from torch import Tensor, nn

from tfmq_export.denoiser import Conditioning, Denoise
from tfmq_export.errors import CalibrationError, ConfigError
from tfmq_export.program import capture
from tfmq_export.ptq import calibration
from tfmq_export.ptq.calibration import CalibrationSet, calibrate
from tfmq_export.ptq.quantize import QuantPlan, quantize
from tfmq_export.ptq.tib import tabulate
from tfmq_export.recipe import QuantRecipe
from tfmq_export.recipe_io import save_recipe


def silent(done: int, total: int) -> None:
    pass


def calibrated(name: str, images: int = 2, seed: int = 0) -> CalibrationSet:
    denoiser, program = captured(name)
    return calibrate(program, denoiser, images=images, seed=seed, progress=silent)


def recipe_of(name: str, seed: int) -> QuantRecipe:
    denoiser, program = captured(name)
    plan = QuantPlan("w4a6", 4, 6, quantized_outputs=frozenset({"conv"}))
    return quantize(program, calibrated(name, seed=seed), tabulate(program, denoiser), plan, {}, silent)


@pytest.mark.parametrize("name", ["film_unet", "edm"])
def test_calibration_costs_one_model_call_per_timestep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, _ = captured(name)
    calls = []
    run = calibration._Watcher.run

    def counted(self: object, *args: Tensor) -> object:
        calls.append(args)
        return run(self, *args)

    monkeypatch.setattr(calibration._Watcher, "run", counted)

    found = calibrated(name)

    visited = [float(step.inputs[denoiser.timestep].reshape(-1)[0]) for step in found.steps]
    assert len(calls) == len(found.steps) == len(denoiser.timesteps)
    assert visited == [pytest.approx(value) for value in denoiser.timesteps.values]


def test_guidance_runs_both_halves_in_every_call() -> None:
    found = calibrated("dit", images=3)

    for step in found.steps:
        assert len(step.inputs["z"]) == 6
        assert step.inputs["y"].tolist() == [0, 1, 2, CLASSES, CLASSES, CLASSES]
        assert torch.equal(*step.inputs["z"].chunk(2))


def test_ranges_are_those_of_the_models_own_trajectory() -> None:
    denoiser, program = captured("film_unet")
    ranges: dict[str, list[float]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, given, out, path=path: ranges.setdefault(path, []).extend(
                [*map(float, given[0].aminmax()), *map(float, out.aminmax())]
            )
        )
        for path, module in denoiser.module.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    images = denoiser.sampler(denoiser.module_denoise(), denoiser.noise(2, 0), {})
    for hook in hooks:
        hook.remove()

    found = calibrated("film_unet")

    # The graph reorders fp32 sums; over a few steps of a random model that stays far below 1e-3.
    torch.testing.assert_close(found.images, images, rtol=1e-3, atol=1e-3)
    for op in program.operations:
        x, y = found.observations[op.input], found.observations[op.name]
        low, high = (torch.tensor(ranges[op.path]).reshape(-1, 4)[:, i] for i in (slice(0, 4, 2), slice(1, 4, 2)))
        expected = [low[:, 0].min(), high[:, 0].max(), low[:, 1].min(), high[:, 1].max()]
        assert [x.low, x.high, y.low, y.high] == pytest.approx([float(v) for v in expected], rel=1e-3, abs=1e-3)


def test_recorded_inputs_are_copies() -> None:
    def in_place(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise.clone()
        for t in (3, 1):
            x -= denoise(x, t)
        return x

    module = nn.Module()
    module.conv = nn.Conv2d(3, 3, 1)
    module.forward = lambda sample, timestep: module.conv(sample)  # type: ignore[method-assign]
    denoiser = probe(module, sampler=in_place)

    found = calibrate(capture(denoiser), denoiser, images=2, seed=0, progress=silent)

    assert torch.equal(found.steps[0].inputs["sample"], denoiser.noise(2, 0))
    assert not torch.equal(found.steps[1].inputs["sample"], found.steps[0].inputs["sample"])


def test_a_seed_gives_the_same_recipe_and_another_seed_another(tmp_path: Path) -> None:
    files = {}
    for label, seed in (("first", 0), ("again", 0), ("other", 1)):
        folder = tmp_path / label
        folder.mkdir()
        save_recipe(recipe_of("edm", seed), folder)
        files[label] = [path.read_bytes() for path in sorted(folder.iterdir())]

    assert files["first"] == files["again"]
    assert files["first"] != files["other"]


def test_a_model_that_turns_nan_is_refused_in_one_line() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.conv(sample.log())

    denoiser = probe(Bad())

    with pytest.raises(CalibrationError, match="NaN or infinity") as error:
        calibrate(capture(denoiser), denoiser, images=2, seed=0, progress=silent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{}, {"label": torch.zeros(2, dtype=torch.long)}], ids=["forgotten", "misnamed"])
def test_a_sampler_that_passes_other_conditioning_is_told_so(given: dict[str, Tensor]) -> None:
    denoiser = denoiser_of("dit")

    with pytest.raises(ConfigError, match="the module takes y"):
        denoiser.module_denoise()(denoiser.noise(2, 0), 1.0, **given)
