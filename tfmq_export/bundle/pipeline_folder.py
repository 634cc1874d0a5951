"""A bundle as a whole pipeline folder: what the source pipeline has beside its denoiser, in the same places.

    OUT/model_index.json    the source's, with the scheduler the bundle was compiled for
    OUT/text_encoder/, tokenizer/, vae/, ...

diffusers then loads the folder, with the compiled denoiser in the place of its own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tfmq_export.errors import LoadError
from tfmq_export.recipe.plain import read_json

INDEX = "model_index.json"
LINKED_FROM = 1 << 20
"""Files of at least so many bytes are linked: small ones are the ones people edit."""

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5"})


def read_index(source: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline folder.

    Raises:
        LoadError: no readable JSON object.
    """
    path = source / INDEX
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not readable JSON ({error}); save the pipeline with save_pretrained") from error


def is_pipeline(source: Path) -> bool:
    """Whether a folder holds a whole pipeline, not a single model."""
    return (source / INDEX).is_file()


def find_components(source: Path) -> dict[str, Path]:
    """Folders of the components that a pipeline really has, by name; optional ones are [null, null] in its index.

    Raises:
        LoadError: a folder is missing, or a name leads out of the pipeline.
    """
    found = {}
    for name, value in read_index(source).items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        if Path(name).name != name or name == "..":
            raise LoadError(f"{source}: {INDEX} lists {name!r}, which is no folder of the pipeline; correct it")
        found[name] = source / name
        if not found[name].is_dir():
            raise LoadError(f"{source}: {INDEX} lists {name}, but there is no such folder; complete the pipeline")
    return found


def add_components(source: Path, root: Path, component: str, scheduler: str, *, link: bool) -> None:
    """Complete a bundle to a pipeline folder.

    Args:
        source: The pipeline folder the model came from.
        root: The bundle, with its denoiser and scheduler in place.
        component: Folder of the denoiser.
        scheduler: Class of the scheduler in ``root``.
        link: Hard links for large files, where the file system allows; else copies.
    Raises:
        LoadError: a component of the index is missing.
    """
    for name, folder in find_components(source).items():
        if name not in (component, "scheduler"):
            _take(folder, root / name, link=link)
    index = read_index(source) | {"scheduler": ["diffusers", scheduler]}
    (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def files_taken(folder: Path) -> list[Path]:
    """Every file of a component's folder but pickled twins of safetensors."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    safe = any(path.suffix == ".safetensors" for path in files)
    return [path for path in files if not (safe and path.suffix in PICKLES)]


def _take(folder: Path, target: Path, *, link: bool) -> None:
    for path in files_taken(folder):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Caches of downloaded models are links to blobs: the blob is what is linked.
        real = path.resolve()
        if not (link and real.stat().st_size >= LINKED_FROM and _linked(real, place)):
            shutil.copyfile(real, place)


def _linked(path: Path, place: Path) -> bool:
    try:
        os.link(path, place)
    except OSError:  # another file system, or one without hard links
        return False
    return True
