"""What a path holds, told by names and headers, before anything is loaded."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tfmq_export.bundle.pipeline_folder import INDEX, is_pipeline, read_index
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.layouts import foreign, latent_diffusion, pixel_diffusion, single_transformers, states
from tfmq_export.models.layouts.folders import NAME, ModelFolder, find_folder, is_model_folder, snapshot_of, weights_of
from tfmq_export.models.layouts.tensor_file import WEIGHTS, State, is_safetensors, read_pickled

PACKED = "tfmq-export model"
"""The format that ``tfmq-pack`` writes, which names itself."""
BESIDE = (
    "vae",
    "vqvae",
    "text_encoder",
    "tokenizer",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)
"""How the names begin of what a pipeline has beside its denoiser."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.ckpt)(?<!\.safetensors)")
"""A model as the Hub names it: its owner, and the model."""


class Kind(StrEnum):
    """Layouts that open."""

    FOLDER = "diffusers folder"
    PACKED = "model.pt"
    LATENT_DIFFUSION = "latent diffusion"
    PIXEL_DIFFUSION = "DDPM"
    SD3 = "Stable Diffusion 3"
    FLUX = "FLUX.1"


@dataclass(frozen=True, slots=True)
class Layout:
    """What was found at a path.

    Attributes:
        kind: How it is read.
        path: The folder or the file that holds the denoiser's weights.
        folder: The model folder, for ``Kind.FOLDER``.
        state: The tensors, for single files.
    """

    kind: Kind
    path: Path
    folder: ModelFolder | None = None
    state: State | None = None

    @property
    def pipeline(self) -> Path | None:
        """The folder that diffusers can load as a pipeline; None for a bare denoiser."""
        return None if self.folder is None else self.folder.pipeline


def find_layout(path: Path, variant: str | None = None) -> Layout:
    """Recognize what a path holds.

    Args:
        variant: Of the weights in a folder, as "fp16"; None takes the plain ones, or the only one there is. Of a file
            "raw": the weights as the last step left them; None takes their average (EMA) where there is one.
    Raises:
        LoadError: nothing that opens; says what it is instead.
        ConfigError: a variant that is not there.
    """
    if not path.exists():
        raise LoadError(f"{path}: {_absent(path)}")
    index = states.INDEX.fullmatch(path.name)
    if path.is_file() and (path.name in (INDEX, "config.json") or index):
        path = path.parent  # the description of a folder stands for the folder
        variant = variant or (index["variant"] if index else None)
    if path.is_dir():
        return _in_folder(path, variant)
    if (path.parent / "config.json").is_file() and (named := NAME.fullmatch(path.name)):
        # The weights of a model folder, by their own name: the folder, and this variant of it.
        component = path.parent
        files, found = weights_of(component, named["before"] or named["after"])
        return Layout(Kind.FOLDER, component, folder=ModelFolder(component, component, files, found, None))
    return _in_file(path, variant)


def _absent(path: Path) -> str:
    """What to say of a path that leads to nothing."""
    if path.is_symlink():
        return "a link that leads nowhere"
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"no such folder; of the Hub nothing is fetched: `hf download {path} --local-dir FOLDER`, and give FOLDER"
        )
    return "no such file or folder"


def _in_folder(path: Path, variant: str | None) -> Layout:
    root = snapshot_of(path)
    whole = root.absolute().parent
    if is_pipeline(whole) and root.name.startswith(BESIDE) and root.name in read_index(whole):
        raise LoadError(f"{path}: the {root.name} of a pipeline, not its denoiser; give the pipeline's folder, {whole}")
    foreign.refuse_folder(root)
    if not is_model_folder(root):
        single = [each for each in sorted(root.iterdir()) if each.suffix in WEIGHTS and each.is_file()]
        if len(single) == 1:  # as LDM is published: model.ckpt and config.yaml in a folder
            return _in_file(single[0], variant)
        if len(single) > 1:
            names = ", ".join(each.name for each in single[:4])
            raise LoadError(f"{path}: no config.json, but {len(single)} files of weights ({names}); give one of them")
    folder = find_folder(path, variant)
    foreign.read_quantized_config(folder.component)
    return Layout(Kind.FOLDER, folder.component, folder=folder)


def _in_file(path: Path, variant: str | None) -> Layout:
    foreign.refuse_file(path)
    raw = is_raw(variant, path)
    if is_safetensors(path) or path.suffix == ".safetensors":
        return _of_state(states.read_state(path, raw=raw))
    data: Any = read_pickled(path)
    if isinstance(data, dict) and data.get("format") == PACKED:
        return Layout(Kind.PACKED, path)
    tensors, notes = states.unnest(data, path, raw=raw)
    return _of_state(State(path, tensors, notes=notes, raw=raw))


def is_raw(variant: str | None, path: Path) -> bool:
    """Whether a file's weights are wanted as the last step left them.

    Raises:
        ConfigError: a variant that files do not have.
    """
    if variant not in (None, "raw"):
        raise ConfigError(
            f"--variant {variant}: {path} is one file; --variant raw takes its weights without their average (EMA)"
        )
    return variant is not None


def _of_state(state: State) -> Layout:
    foreign.refuse_weights(state)
    if latent_diffusion.prefix_of(state) is not None:
        return Layout(Kind.LATENT_DIFFUSION, state.path, state=state)
    if pixel_diffusion.is_pixel_diffusion(state):
        return Layout(Kind.PIXEL_DIFFUSION, state.path, state=state)
    if single_transformers.prefix_of(state, single_transformers.SD3_FIRST) is not None:
        return Layout(Kind.SD3, state.path, state=state)
    if single_transformers.prefix_of(state, single_transformers.FLUX_FIRST) is not None:
        return Layout(Kind.FLUX, state.path, state=state)
    raise LoadError(
        f"{state.path}: holds tensors but no description of the model; pack a diffusers folder with "
        "`tfmq-pack FOLDER -o model.pt`, or name the code that builds it: --factory package.module:build"
    )
