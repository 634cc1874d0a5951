"""diffusers folders on disk: a single model, or a pipeline with a ``model_index.json``."""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.errors import LoadError, first_line
from tfmq_export.models import single_precision
from tfmq_export.models.diffusers_model import class_of, require_few_layers
from tfmq_export.models.layouts.descriptions import read_scheduler_beside
from tfmq_export.models.layouts.folders import ModelFolder, class_name, find_folder, read_config
from tfmq_export.models.layouts.foreign import refuse_folder, refuse_quantized, refuse_quantized_config
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.states import INDEX, fit, read_state, shards_of
from tfmq_export.models.layouts.tensor_file import StoredTensors
from tfmq_export.models.quiet_loading import quiet_loading
from tfmq_export.models.weights import load_weights, require_finite, require_float_files, require_keys

HALF: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16}
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(root: Path, variant: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load the denoiser of a folder and the configuration of its scheduler.

    Args:
        variant: Of its weights, as "fp16"; None takes the plain ones, or the only one there is.
    Raises:
        LoadError: names the file that is missing, unreadable or unsafe.
    """
    refuse_folder(root)
    opened = read_model_folder(find_folder(root, variant))
    return opened.model, dict(opened.scheduler)


def read_model_folder(folder: ModelFolder) -> Opened:
    """Load a denoiser in the format of diffusers, and the configuration of its scheduler.

    Raises:
        LoadError: names the file that is missing, unreadable or unsafe.
    """
    model, notes = read_weights(folder, class_of)
    scheduler = read_scheduler_beside(folder.root) or read_scheduler_beside(folder.component)
    if scheduler is None:
        raise LoadError(
            f"{folder.root}: no scheduler_config.json beside the model or in scheduler/; copy it from the pipeline"
        )
    return Opened(model, scheduler, notes=notes)


def read_weights(
    folder: ModelFolder, class_named: Callable[[str, str | Path], Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of diffusers with all of its weights and nothing else, and what was chosen on the way.

    Args:
        class_named: Its class, by name; refuses those that are not taken.
    Raises:
        LoadError: names the file that is missing, unreadable or unsafe.
    """
    component = folder.component
    config = read_config(component)
    require_few_layers(config, component)
    refuse_quantized_config(config, component)
    name = class_name(config)
    known = class_named(name, component)
    notes = () if folder.variant is None else (f"variant {folder.variant}",)
    if folder.pickled:
        model, chosen = _from_pickles(folder, known, config)
    else:
        model, chosen = _from_safetensors(folder, known, name)
    require_finite(model, component)
    return model, (*notes, *chosen)


def _from_safetensors(folder: ModelFolder, known: Any, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    component = folder.component
    for path in component.glob("*.json"):
        if (index := INDEX.fullmatch(path.name)) and index["variant"] == folder.variant and ".bin." not in path.name:
            shards_of(path)  # refuses what is not there
    stored = StoredTensors(component, folder.files)
    refuse_quantized(stored.types, component)
    require_float_files(folder.files)
    half = _half_type(stored)
    try:
        with quiet_loading():  # what diffusers warns of at length is an error below, in one line
            model, found = known.from_pretrained(
                component,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=True,  # weights are mapped
                output_loading_info=True,
                variant=folder.variant,
                torch_dtype=half,
            )
            if half is not None:
                _compute_buffers(model, known, stored)
    except Exception as error:  # diffusers' loader, which may raise anything
        raise LoadError(f"{component}: cannot load {name}: {first_line(error)}") from error
    chosen: tuple[str, ...] = ()
    if found["missing_keys"] or found["unexpected_keys"]:
        inside, chosen = fit(stored, model.state_dict().keys())
        if not chosen:
            require_keys(found["missing_keys"], found["unexpected_keys"], component)
        load_weights(model, {key: inside[key] for key in inside}, component, assign=True)
    return model, chosen


def _half_type(stored: StoredTensors) -> torch.dtype | None:
    """What large weights stay in until they are cast into files (``single_precision.py``); None for the usual."""
    found = {kind for kind in stored.types.values() if kind.startswith(("F", "BF"))}
    single = 4 * sum(math.prod(shape) for shape in stored.shapes.values())
    return HALF.get(found.pop()) if len(found) == 1 and single > single_precision.HELD_BYTES else None


def _compute_buffers(model: nn.Module, known: Any, stored: StoredTensors) -> None:
    """Tables that are computed and not stored, in single precision: diffusers computes them in the weights' type."""
    settings: Any = model.config  # of diffusers, which torch's types do not know
    with init_empty_weights():
        fresh = known.from_config(settings)
    for name, value in fresh.named_buffers():
        if name not in stored.types:
            holder, _, own = name.rpartition(".")
            model.get_submodule(holder).register_buffer(own, value, persistent=False)


def _from_pickles(folder: ModelFolder, known: Any, config: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    """As older repositories have them: read with ``weights_only``, so that nothing in them runs."""
    state: dict[str, Any] = {}
    for path in folder.files:
        state |= read_state(path).tensors
    try:
        with quiet_logger("diffusers"), init_empty_weights():
            model = known.from_config(dict(config))
    except Exception as error:  # the class's own reading of its configuration
        raise LoadError(f"{folder.component}: cannot build {known.__name__}: {first_line(error)}") from error
    own = model.state_dict().keys()
    state = {_of_today(key, own): value for key, value in state.items()}
    inside, chosen = fit(state, own)
    load_weights(model, dict(inside), folder.component, assign=True)
    return model, chosen


def _of_today(name: str, own: Collection[str]) -> str:
    """What diffusers called the projections of attention in its first releases, in today's names."""
    if name in own:
        return name
    for before, today in RENAMED.items():
        if (now := name.replace(f".{before}.", f".{today}.")) in own:
            return now
    return name
