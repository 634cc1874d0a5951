"""What stands beside a checkpoint and describes it: the YAML it was trained with, a scheduler_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tfmq_export.errors import LoadError, first_line
from tfmq_export.models.layouts.tensor_file import WEIGHTS
from tfmq_export.recipe.plain import read_json

SCHEDULER = "scheduler_config.json"
YAMLS = (".yaml", ".yml")


def read_yaml_beside(path: Path) -> tuple[Mapping[str, Any], Path | None]:
    """The training configuration beside a checkpoint: of its name, or else the only one beside the only checkpoint.

    What is called otherwise may be another checkpoint's, or no model's at all.

    Returns:
        Plain data, read with ``safe_load``, and its file; empty and None where there is none.
    Raises:
        LoadError: it is no readable YAML.
    """
    named = next((path.with_suffix(suffix) for suffix in YAMLS if path.with_suffix(suffix).is_file()), None)
    found = named or _of_the_folder(path.parent)
    if found is None:
        return {}, None
    try:
        content = yaml.safe_load(found.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LoadError(f"{found}: not readable YAML: {first_line(error)}; it describes {path.name}") from error
    describes = isinstance(content, dict) and (named is not None or isinstance(content.get("model"), dict))
    return (content, found) if describes else ({}, None)


def _of_the_folder(folder: Path) -> Path | None:
    """The YAML of a folder with one checkpoint: under a usual name, or the only one."""
    files = [each for each in sorted(folder.iterdir()) if each.is_file()]
    yamls = [each for each in files if each.suffix in YAMLS]
    usual = [each for each in yamls if each.stem in ("config", "project")]
    if sum(each.suffix in WEIGHTS for each in files) > 1 or not (usual or len(yamls) == 1):
        return None
    return (usual or yamls)[0]


def read_scheduler_beside(path: Path) -> Mapping[str, Any] | None:
    """A ``scheduler_config.json`` beside a file or in a folder, in ``scheduler/`` of it or of the folder above.

    Raises:
        LoadError: it is no JSON object.
    """
    folder = path if path.is_dir() else path.parent
    for place in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER):
        if place.is_file():
            return read_object(place)
    return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoadError: it cannot be read, or is something else.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not a readable JSON object: {first_line(error)}") from error


def looked_up(config: Mapping[str, Any], *path: str) -> Any:
    """A value in nested mappings; None where a step is missing."""
    found: Any = config
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found
