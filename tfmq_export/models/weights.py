"""Weights into a module, all of them and nothing else, from whatever file they come.

A file that does not fit leaves layers at their random initial values, and a proof against garbage cannot see garbage:
so a key too many, one too few, a type that is no floating point, or a number that is not finite is an error here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tfmq_export.errors import LoadError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STORED_FLOATS = ("F32", "F16", "BF16", "F64")
"""The same, as safetensors calls them."""
STORED_INDICES = ("I64", "I32")
"""Of buffers that count positions; as a weight they would not fit the model's type."""
WRAPPERS = ("module.", "_orig_mod.", "model.", "unet.", "transformer.", "model.diffusion_model.", "ema.", "net.")
"""What training frameworks and whole checkpoints put in front of a model's own keys."""
SHOWN = 3


def load_weights(module: nn.Module, state: Any, path: Path, *, assign: bool = False) -> None:
    """Put a state dict into a module, all of it.

    Args:
        assign: Let the module have the tensors themselves, mapped as they may be, and not copy them.
    Raises:
        LoadError: keys, shapes or types differ, or a number is not finite.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LoadError(f"{path}: expected a state_dict of tensors")
    own = module.state_dict()
    require_keys(own.keys() - state.keys(), state.keys() - own.keys(), path)
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise LoadError(
                f"{path}: these weights belong to another architecture: {name} is {list(value.shape)}, the model has "
                f"{list(own[name].shape)}"
            )
        if own[name].is_floating_point() and value.dtype not in FLOATS:
            raise LoadError(_wrong_type(path, name, str(value.dtype).removeprefix("torch.")))
    module.load_state_dict(dict(state), assign=assign)
    require_finite(module, path)


def require_keys(missing: Iterable[str], unexpected: Iterable[str], path: Path) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        LoadError: lists what is missing and what nobody asked for, and says where a prefix explains it.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's tensors are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are not the model's ({_some(unexpected)})")
    raise LoadError(f"{path}: {' and '.join(parts)}; {_advice(missing, unexpected)}")


def require_float_files(files: Iterable[Path]) -> None:
    """Refuse stored types that would be cast to floating point without their meaning.

    Args:
        files: safetensors; only their headers are read.
    Raises:
        LoadError: names the file and the tensor.
    """
    for path in files:
        try:
            with safe_open(path, "pt") as stored:
                types = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{path}: not a readable safetensors file: {error}") from error
        for name, kind in types.items():
            if kind not in (*STORED_FLOATS, *STORED_INDICES):
                raise LoadError(_wrong_type(path, name, kind))


def require_finite(module: nn.Module, path: Path) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        LoadError: names the first one.
    """
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise LoadError(f"{path}: {name} holds NaN or infinity; the file is damaged, or training diverged")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _advice(missing: list[str], unexpected: list[str]) -> str:
    """What the names themselves say of where the file came from."""
    if any(".base_layer." in name or "lora_" in name for name in unexpected):
        return "this is a model with adapters (LoRA) beside it: merge them first (fuse_lora or merge_and_unload)"
    for prefix in WRAPPERS:
        stripped = {name.removeprefix(prefix) for name in unexpected if name.startswith(prefix)}
        if missing and stripped >= set(missing):
            return f"its keys start with {prefix!r}: save the model inside, or strip the prefix"
        added = {f"{prefix}{name}" for name in unexpected}
        if missing and added >= set(missing):
            return f"the model's keys start with {prefix!r}, which the file lacks: load them into the module inside"
    return "these weights belong to another architecture, or the file is not complete"


def _wrong_type(path: Path, name: str, kind: str) -> str:
    return (
        f"{path}: {name} is stored as {kind}, not in floating point; weights that were quantized or compressed mean "
        "nothing without their scales: start from the original weights"
    )
