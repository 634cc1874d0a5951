"""Weights fit a model exactly, in floating point and finite, or they are refused with what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from nets.tiny_unets import attention_unet
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_export.errors import LoadError
from tfmq_export.models.folder import read_folder
from tfmq_export.models.load import Source, load
from tfmq_export.models.model_pt import write_checkpoint
from tfmq_export.models.prompts import PromptSet
from tfmq_export.models.weights import load_weights

FILE = "diffusion_pytorch_model.safetensors"
State = dict[str, Tensor]


def with_adapters(state: State) -> State:
    """As PEFT saves a model whose adapters were not merged."""
    made = {}
    for name, value in state.items():
        if name.endswith("to_q.weight"):
            stem = name.removesuffix(".weight")
            made[f"{stem}.base_layer.weight"] = value
            made[f"{stem}.lora_A.default.weight"] = torch.randn(2, value.shape[1])
        else:
            made[name] = value
    return made


def wrapped(state: State) -> State:
    """As DistributedDataParallel saves."""
    return {f"module.{name}": value for name, value in state.items()}


def short(state: State) -> State:
    return {name: value for name, value in state.items() if name != "conv_in.bias"}


def with_one_more(state: State) -> State:
    return {**state, "extra.weight": torch.zeros(1)}


def in_bytes(state: State) -> State:
    return {**state, "conv_in.bias": state["conv_in.bias"].to(torch.int8)}


def in_truth_values(state: State) -> State:
    return {**state, "conv_in.bias": state["conv_in.bias"] > 0}


def not_finite(state: State) -> State:
    return {**state, "conv_in.bias": torch.full_like(state["conv_in.bias"], torch.nan)}


DAMAGES = [
    (with_adapters, "merge them first"),
    (short, r"1 of the model's tensors are missing \(conv_in.bias\)"),
    (with_one_more, r"1 are not the model's \(extra.weight\)"),
    (in_bytes, "conv_in.bias is stored as (I8|int8), not in floating point"),
    (in_truth_values, "conv_in.bias is stored as (BOOL|bool), not in floating point"),
    (not_finite, "conv_in.bias holds NaN or infinity"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_folder_whose_weights_do_not_fit_is_refused(damage: Any, says: str, tmp_path: Path) -> None:
    attention_unet().save_pretrained(tmp_path)
    DDIMScheduler().save_config(tmp_path)
    save_file(damage(load_file(tmp_path / FILE)), tmp_path / FILE, {"format": "pt"})

    with pytest.raises(LoadError, match=says):
        read_folder(tmp_path)


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_file_whose_weights_do_not_fit_is_refused(damage: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write_checkpoint(path, attention_unet(), dict(DDIMScheduler().config), PromptSet())
    document = torch.load(path, weights_only=True)
    torch.save({**document, "state_dict": damage(document["state_dict"])}, path)

    with pytest.raises(LoadError, match=says):
        load(Source(path))


def test_a_folder_whose_keys_have_a_wrappers_prefix_is_the_same_model(tmp_path: Path) -> None:
    model = attention_unet().eval()
    model.save_pretrained(tmp_path)
    DDIMScheduler().save_config(tmp_path)
    save_file(wrapped(load_file(tmp_path / FILE)), tmp_path / FILE, {"format": "pt"})

    loaded, _ = read_folder(tmp_path)

    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(loaded(x, 3).sample, model(x, 3).sample)  # mapped weights lie elsewhere
    assert "prefix 'module.'" in load(Source(tmp_path, steps=2)).source


def test_weights_without_the_models_own_prefix_are_told_so() -> None:
    module = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2)})

    with pytest.raises(LoadError, match=r"the model's keys start with 'net\.', which the file lacks"):
        load_weights(module, torch.nn.Linear(2, 2).state_dict(), Path("w.pt"))


def test_another_shape_names_the_tensor() -> None:
    with pytest.raises(LoadError, match=r"weight is \[3, 2\], the model has \[2, 2\]"):
        load_weights(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3).state_dict(), Path("w.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_points_are_taken(dtype: torch.dtype) -> None:
    module, stored = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(dtype)

    load_weights(module, stored.state_dict(), Path("w.pt"))

    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, stored.weight.float())


def test_a_class_embedding_nobody_knows_is_refused(tmp_path: Path) -> None:
    model = attention_unet()
    model.register_to_config(class_embed_type="nope")
    model.save_pretrained(tmp_path)
    DDIMScheduler().save_config(tmp_path)

    with pytest.raises(LoadError, match="class_embed_type 'nope' is none that diffusers knows"):
        load(Source(tmp_path, steps=2))


@pytest.mark.parametrize("stored", [[], "none", {"examples": []}, {"examples": {"x": 1}}, {"guidance_scale": "7"}])
def test_stored_conditioning_of_another_form_is_refused(stored: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write_checkpoint(path, attention_unet(), dict(DDIMScheduler().config), PromptSet())
    torch.save({**torch.load(path, weights_only=True), "conditioning": stored}, path)

    with pytest.raises(LoadError, match="its conditioning is not examples and unconditional values by name"):
        load(Source(path))
