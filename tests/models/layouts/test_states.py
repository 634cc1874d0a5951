"""State dicts are understood where they can be meant in one way only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import handwritten
from safetensors.torch import save_file
from torch import Tensor

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.layouts.states import fit, read_state, unnest
from tfmq_export.models.load import Source, load

State = dict[str, Tensor]
FACTORY = "nets.handwritten:build_edm"


def trained_state(seed: int = 7) -> State:
    torch.manual_seed(seed)
    module, _ = handwritten.build_edm()
    return {name: torch.randn_like(value) for name, value in module.state_dict().items()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


RAW, EMA = trained_state(7), trained_state(8)
KEPT: list[tuple[str, Any, State, str]] = [
    ("DistributedDataParallel", under("module.", RAW), RAW, "module."),
    ("torch.compile", under("_orig_mod.", RAW), RAW, ""),
    ("both", under("module._orig_mod.", RAW), RAW, "module."),
    (
        "Lightning",
        {"state_dict": {**under("model.", RAW), "loss.scale": torch.ones(1)}, "epoch": 3, "optimizer_states": [{}]},
        RAW,
        "model.",
    ),
    ("a checkpoint with its average", {"model": RAW, "ema": EMA, "step": 3}, EMA, "EMA weights ('ema')"),
    ("an average beside", {**RAW, **under("ema.", EMA)}, EMA, "EMA weights ('ema.')"),
    (
        "ema-pytorch",
        {**under("online_model.", RAW), **under("ema_model.", EMA), "initted": torch.ones(1), "step": torch.ones(1)},
        EMA,
        "EMA weights ('ema_model.')",
    ),
    ("a list", [RAW, {"state": {}}, 3, 4, EMA], EMA, "EMA weights"),
    ("model_state_dict", {"model_state_dict": RAW, "optimizer_state_dict": {"state": {}}, "loss": 0.1}, RAW, ""),
    ("numbers beside", {**RAW, "epoch": 3}, RAW, ""),
]


@pytest.mark.parametrize(("data", "wanted", "said"), [row[1:] for row in KEPT], ids=[row[0] for row in KEPT])
def test_what_a_trainer_left_is_the_models_weights(data: Any, wanted: State, said: str, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "w.pt")

    denoiser = load(Source(tmp_path / "w.pt", factory=FACTORY))

    found = denoiser.module.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert said in denoiser.source


RAWS: list[Any] = [
    {"model": RAW, "ema": EMA},
    {**RAW, **under("ema.", EMA)},
    {**under("online_model.", RAW), **under("ema_model.", EMA)},
    [RAW, {"state": {}}, 3, 4, EMA],
]


@pytest.mark.parametrize("data", RAWS)
def test_weights_without_their_average_are_asked_for_by_name(data: Any, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "w.pt")

    denoiser = load(Source(tmp_path / "w.pt", factory=FACTORY, variant="raw"))

    found = denoiser.module.state_dict()
    assert all(torch.equal(found[name], RAW[name]) for name in RAW)
    assert "EMA" not in denoiser.source


def test_a_file_has_no_other_variant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--variant fp16: .* is one file; --variant raw"):
        load(Source(tmp_path / "w.pt", factory=FACTORY, variant="fp16"))


def test_shards_are_given_by_their_index(tmp_path: Path) -> None:
    names = sorted(RAW)
    places = {name: f"w-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: RAW[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    found = load(Source(tmp_path / "w.safetensors.index.json", factory=FACTORY)).module.state_dict()

    assert all(torch.equal(found[name], RAW[name]) for name in RAW)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../b.safetensors"}}, "which is no file beside it"),
        ({"weight_map": {"a": "b.bin"}}, r"its shards are pickled \(b.bin\)"),
        ({"weight_map": {"a": "b.safetensors"}}, "lists b.safetensors, which is not there"),
        ({"a": 1}, "no index of weights"),
        ([], "no index of weights"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(index: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(LoadError, match=says):
        load(Source(tmp_path / "w.safetensors.index.json", factory=FACTORY))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({**under("student.", RAW), **under("teacher.", EMA)}, "tensors are missing"),
        ({"student": RAW, "teacher": EMA}, r"no state dict of tensors inside \(student, teacher\)"),
        ({"epoch": 3}, "no state dict of tensors inside"),
        (torch.zeros(3), "no state dict of tensors inside"),
        ({k: v for k, v in under("module.", RAW).items() if not k.endswith("bias")}, "tensors are missing"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(data: Any, says: str, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "w.pt")

    with pytest.raises(LoadError, match=says):
        load(Source(tmp_path / "w.pt", factory=FACTORY))


def test_a_complete_state_is_left_as_it_is() -> None:
    assert fit(RAW, RAW.keys()) == (RAW, ())
    more = {**RAW, "extra.weight": torch.ones(1)}
    assert fit(more, RAW.keys()) == (more, ())


def test_a_state_dict_in_a_state_dict_is_found() -> None:
    assert unnest({"a": {"state_dict": RAW}, "step": 1}, Path("w.pt"))[0] == RAW


def test_no_file_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        read_state(tmp_path / "w.pt")
