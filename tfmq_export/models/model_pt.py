"""``model.pt``: one ``torch.save``d dict of plain data, read without running anything in it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import LoadError
from tfmq_export.models.diffusers_model import build
from tfmq_export.models.layouts.tensor_file import read_pickled
from tfmq_export.models.prompts import PromptSet, read_stored
from tfmq_export.models.weights import load_weights

FORMAT = "tfmq-export model"
VERSION = 1


def read_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any], PromptSet]:
    """Load a ``model.pt``: the model, its scheduler's configuration and its conditioning.

    Raises:
        LoadError: the file is unreadable, of another format, or its weights do not fit its architecture.
    """
    data = read_pickled(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LoadError(
            f"{path}: holds tensors but no description of the model; pack a diffusers folder with "
            "`tfmq-pack FOLDER -o model.pt`, or name the code that builds it: --factory package.module:build"
        )
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise LoadError(f"{path}: format version {str(version)[:20]}, this release reads {VERSION}; pack it again")
    missing = [key for key in ("architecture", "config", "state_dict", "scheduler") if key not in data]
    if missing:
        raise LoadError(f"{path}: lacks {', '.join(missing)}; pack it again with tfmq-pack")
    kinds = {"architecture": str, "config": dict, "scheduler": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(data[key], kind)]:
        raise LoadError(f"{path}: {wrong[0]} is a {type(data[wrong[0]]).__name__}; pack it again with tfmq-pack")
    with init_empty_weights():
        model = build(data["architecture"], data["config"], path)
    load_weights(model, data["state_dict"], path, assign=True)
    return model, data["scheduler"], read_stored(data.get("conditioning", {}), path)


def write_checkpoint(path: Path, model: nn.Module, scheduler: dict[str, Any], prompts: PromptSet) -> None:
    """Write a ``model.pt``, first under a temporary name.

    Raises:
        LoadError: the model is more than its configuration says, so that it could not be built again.
    """
    settings: Any = model.config  # of diffusers, which torch's types do not know
    config = {key: _plain(value) for key, value in settings.items() if not key.startswith("_")}
    with torch.device("meta"):
        again = build(type(model).__name__, config, path)
    if _heads(again) != _heads(model):
        raise LoadError(
            f"{path}: the attention heads of this {type(model).__name__} are not in its configuration, so it cannot be "
            "packed; give the original file instead"
        )
    document = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": type(model).__name__,
        "config": config,
        "state_dict": model.state_dict(),
        "scheduler": _plain(scheduler),
        "conditioning": {
            "examples": dict(prompts.examples),
            "unconditional": dict(prompts.unconditional),
            "guidance_scale": prompts.guidance_scale,
        },
    }
    with replaced_file(path) as partial:
        torch.save(document, partial)


def _heads(model: nn.Module) -> dict[str, object]:
    """Attention heads by module."""
    return {name: module.heads for name, module in model.named_modules() if hasattr(module, "heads")}


def _plain(value: Any) -> Any:
    """Lists, dicts and scalars only, so that ``weights_only`` reads them back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
