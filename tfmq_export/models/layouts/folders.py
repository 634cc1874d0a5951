"""Folders of diffusers as they lie on disks: pipelines and single models, variants and shards, caches of the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle.pipeline_folder import INDEX, is_pipeline, read_index
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.layouts.descriptions import read_object

DENOISERS = ("transformer", "unet", "decoder", "prior")
"""Folders of a pipeline that may hold its denoiser, in the order they are looked for."""
STEM = "diffusion_pytorch_model"
_BEHIND = (
    r"(?:\.(?P<before>[\w-]+?))?(?:-\d{5}-of-\d{5}(?:\.(?P<after>[\w-]+))?)?\.(?P<kind>safetensors|bin)"  # of the stem
)
NAME = re.compile(STEM + _BEHIND)
"""Weights: a variant stands in front of the shard's number, or behind it."""
COMPONENT = re.compile(f"(?:{STEM}|model){_BEHIND}")
"""The same of any component: transformers says ``model``."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the format of diffusers.

    Attributes:
        root: The folder that was meant: a pipeline, or the model itself.
        component: The folder with ``config.json`` and weights.
        files: Weights that will be read.
        variant: What stands in their names, as "fp16"; None for the plain ones.
        pipeline: ``root`` where it is a pipeline whose components have folders.
    """

    root: Path
    component: Path
    files: tuple[Path, ...]
    variant: str | None
    pipeline: Path | None

    @property
    def pickled(self) -> bool:
        """Whether the weights are pickles, of plain tensors alone."""
        return any(file.suffix == ".bin" for file in self.files)


def find_folder(path: Path, variant: str | None) -> ModelFolder:
    """The denoiser of a folder, and which of its weights are meant.

    Raises:
        LoadError: no model, no safetensors, or several variants and none named.
        ConfigError: the variant that was named is not there.
    """
    root = snapshot_of(path)
    component = root
    if is_pipeline(root):
        # The first pipelines of diffusers had one folder for all: config.json, weights and scheduler beside the index.
        listed = [name for name in DENOISERS if (read_index(root).get(name) or [None])[0] is not None]
        component = next((root / name for name in (*listed, *DENOISERS) if (root / name).is_dir()), root)
        if component == root and not (root / "config.json").is_file():
            component = root / "unet"
    files, variant = weights_of(component, variant)
    whole = is_pipeline(root) and component != root
    return ModelFolder(root, component, files, variant, root if whole else None)


def snapshot_of(path: Path) -> Path:
    """The snapshot that a repository in a cache of the hub stands for; any other folder is itself.

    Raises:
        LoadError: no snapshot, or several and no ``refs/main``.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or is_pipeline(path) or (path / "config.json").is_file():
        return path
    found = sorted(each for each in snapshots.iterdir() if each.is_dir())
    main = path / "refs" / "main"
    if main.is_file():
        named = snapshots / main.read_text("utf-8").strip()
        if named.parent == snapshots and named.is_dir():
            return named
    if len(found) == 1:
        return found[0]
    what = (
        f"{len(found)} snapshots ({', '.join(each.name for each in found[:3])}) and no refs/main" if found else "none"
    )
    raise LoadError(f"{path}: a repository in a cache of the hub with {what}; give the folder of a snapshot")


def weights_of(component: Path, variant: str | None) -> tuple[tuple[Path, ...], str | None]:
    """The weights of a model folder, safetensors before pickles: plain ones, the only variant, or the one named.

    Raises:
        LoadError: there are none, or there are several variants and no plain ones.
        ConfigError: not the one that was named.
    """
    variants: dict[str | None, list[Path]] = {}
    known = [(path, found) for path in sorted(component.glob(f"{STEM}*")) if (found := NAME.fullmatch(path.name))]
    safe = any(found["kind"] == "safetensors" for _, found in known)
    for path, found in known:
        if not safe or found["kind"] == "safetensors":
            variants.setdefault(found["before"] or found["after"], []).append(path)
    named = ", ".join(sorted(each for each in variants if each))
    if not variants:
        if not (component / "config.json").is_file():
            raise LoadError(f"{component / 'config.json'}: no such file; a diffusers model folder has one")
        raise LoadError(f"{component}: no {STEM}.safetensors; save the model with save_pretrained")
    if variant is not None:
        if variant not in variants:
            raise ConfigError(f"--variant {variant}: {component} has {named or 'no variants, only the plain weights'}")
        return tuple(variants[variant]), variant
    if None in variants:
        return tuple(variants[None]), None
    if len(variants) > 1:
        raise LoadError(f"{component}: its weights come in several variants, {named}; choose one with --variant")
    ((only, files),) = variants.items()
    return tuple(files), only


def needed_variant(root: Path) -> str | None:
    """The variant that must be named to load a pipeline: some component has no other safetensors."""
    folders = [each for each in sorted(root.iterdir()) if each.is_dir()]
    return next(filter(None, map(lone_variant, folders)), None)


def lone_variant(component: Path) -> str | None:
    """The variant of a component's safetensors where there are no plain ones; the first of several."""
    known = [found for path in sorted(component.glob("*.safetensors")) if (found := COMPONENT.fullmatch(path.name))]
    variants = [found["before"] or found["after"] for found in known]
    return None if not variants or None in variants else str(variants[0])


def class_name(config: Mapping[str, Any]) -> str:
    """The class of a model's configuration, under the name diffusers has for it today."""
    name = str(config.get("_class_name"))
    return str(_renamed_classes().get(name, {}).get(config.get("norm_type"), name))


def _renamed_classes() -> Mapping[str, Mapping[object, str]]:
    """diffusers' own table: class, kind of norm, class of today."""
    try:
        from diffusers.models.model_loading_utils import _CLASS_REMAPPING_DICT
    except ImportError:  # it is diffusers' own, which may move it
        return {
            "Transformer2DModel": {
                "ada_norm_zero": "DiTTransformer2DModel",
                "ada_norm_single": "PixArtTransformer2DModel",
            }
        }
    renamed: Mapping[str, Mapping[object, str]] = _CLASS_REMAPPING_DICT
    return renamed


def read_config(component: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        LoadError: missing, or no JSON object.
    """
    path = component / "config.json"
    if not path.exists():
        raise LoadError(f"{path}: no such file; a diffusers model folder has one")
    return read_object(path)


def is_model_folder(folder: Path) -> bool:
    """Whether diffusers would take it for a model or a pipeline."""
    return (folder / INDEX).is_file() or (folder / "config.json").is_file()
