"""diffusers folders on disk: a single model, or a pipeline with a ``model_index.json``."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from tfmq_export.bundle.pipeline_folder import is_pipeline
from tfmq_export.capture.program import quiet_logger
from tfmq_export.errors import LoadError, first_line
from tfmq_export.models.diffusers_model import TRANSFORMER, UNET, class_of
from tfmq_export.models.weights import require_finite, require_float_files, require_keys

WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_folder(root: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the denoiser of a folder and the configuration of its scheduler.

    Raises:
        LoadError: names the file that is missing, unreadable or unsafe.
    """
    component = root
    if is_pipeline(root):
        component = root / (TRANSFORMER if (root / TRANSFORMER).is_dir() else UNET)
    config = read_json(component / "config.json")
    name = str(config.get("_class_name"))
    known = class_of(name, component)
    files = sorted(component.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        pickled = any(component.glob("*.bin"))
        why = "only pickled weights, which could run code" if pickled else f"no {WEIGHTS}"
        raise LoadError(f"{component}: {why}; save the model with save_pretrained(safe_serialization=True)")
    require_float_files(files)
    try:
        with quiet_logger("diffusers"):  # what it warns of at length is an error below, in one line
            model, found = known.from_pretrained(
                component,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise LoadError(f"{component}: cannot load {name}: {first_line(error)}") from error
    require_keys(found["missing_keys"], found["unexpected_keys"], component)
    require_finite(model, component)
    for place in (root / "scheduler" / "scheduler_config.json", component / "scheduler_config.json"):
        if place.is_file():
            return model, read_json(place)
    raise LoadError(f"{root}: no scheduler_config.json beside the model or in scheduler/; copy it from the pipeline")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoadError: missing, or no JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file; a diffusers model folder has one") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not readable JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path}: expected a JSON object")
    return value
