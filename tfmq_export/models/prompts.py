"""What a model is conditioned on: examples to calibrate with, the "no prompt" value, and how strongly it guides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.capture.denoiser import Conditioning
from tfmq_export.errors import ConfigError, LoadError, first_line

UNCONDITIONAL = ".unconditional"
"""Behind an input's name in a file: its "no prompt" value."""
LABELS = "class_labels"
OF_PIPELINES = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
"""What diffusers' pipelines call an input, and its name."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Conditioning to calibrate with.

    Attributes:
        examples: [examples, ...] by input name.
        unconditional: [...] by input name; empty without guidance.
        guidance_scale: None leaves guidance to the model. As in diffusers' pipelines, 1 and less is no guidance: the
            prompt alone.
    """

    examples: Conditioning = field(default_factory=dict)
    unconditional: Conditioning = field(default_factory=dict)
    guidance_scale: float | None = None


def effective_scale(scale: float, unconditional: Conditioning, inputs: Conditioning, where: str) -> float:
    """The guidance scale images are drawn with: 1 where there is no guidance.

    Args:
        scale: As asked for.
        inputs: Conditioning of the model, by name.
    Raises:
        ConfigError: no number from 0, or guidance without a "no prompt" value for every input.
    """
    if not math.isfinite(scale) or scale < 0:
        raise ConfigError(f"{where}: a guidance scale of {scale:g}; give a number from 0 (1 and less is no guidance)")
    if scale <= 1:
        return 1.0
    missing = sorted(inputs.keys() - unconditional.keys())
    if missing or not inputs:
        what = f"no unconditional value for {', '.join(missing)}" if missing else "the model takes no conditioning"
        raise ConfigError(
            f"{where}: guidance of {scale:g}, but {what}; give it beside the examples as {(missing or ['NAME'])[0]}"
            f"{UNCONDITIONAL}, or a guidance scale of 1"
        )
    return float(scale)


def fitted(prompts: PromptSet, shapes: Mapping[str, tuple[object, ...]], where: str) -> PromptSet:
    """The prompts as float32, if they have every input in its shape and nothing else.

    Args:
        shapes: [prompts, ...] by input name; words stand for sizes that may vary.
    Raises:
        LoadError: something is missing, unknown or of another shape.
    """
    _require_known([*prompts.examples, *prompts.unconditional], shapes, where)
    examples: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        given = prompts.examples.get(name)
        if given is None or not _fits(tuple(given.shape), shape):
            got = "none" if given is None else str(list(given.shape))
            raise LoadError(
                f"{where}: calibration needs real prompt embeddings, {name} [{', '.join(map(str, shape))}], "
                f"got {got}; give the folder of its pipeline, which embeds prompts, or a safetensors file with "
                "--conditioning"
            )
        examples[name] = _finite(name, given.float(), where)
    unconditional = {name: _null(name, value, examples[name], where) for name, value in prompts.unconditional.items()}
    return replace(prompts, examples=examples, unconditional=unconditional)


def labelled(prompts: PromptSet, classes: int, where: str) -> tuple[PromptSet, PromptSet]:
    """The class labels that were given beside prompts, and the prompts without them.

    Args:
        classes: How many there are.
    Raises:
        LoadError: none were given, or they are no labels.
    """
    found = []
    for group, shape in ((prompts.examples, "[prompts]"), (prompts.unconditional, "[]")):
        value = group.get(LABELS)
        if value is None:
            continue
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if not whole or value.ndim != shape.count("prompts") or not ((value >= 0) & (value < classes)).all():
            raise LoadError(
                f"{where}: {LABELS} are {list(value.shape)} of {value.dtype}; give whole numbers from 0 to "
                f"{classes - 1}, {shape}"
            )
        found.append(value.long())
    if LABELS not in prompts.examples or not found:
        raise LoadError(
            f"{where}: the model takes a class label beside its prompt; add {LABELS} [prompts], whole numbers from 0 "
            f"to {classes - 1}, to the file of --conditioning, and {LABELS}{UNCONDITIONAL} [] where it is guided"
        )
    others = [{k: v for k, v in group.items() if k != LABELS} for group in (prompts.examples, prompts.unconditional)]
    labels = PromptSet({LABELS: found[0]}, {LABELS: found[1]} if len(found) > 1 else {})
    return replace(prompts, examples=others[0], unconditional=others[1]), labels


def read_prompts(path: Path, guidance_scale: float | None) -> PromptSet:
    """Read ``--conditioning``: ``NAME`` [examples, ...] and ``NAME.unconditional`` [...] for each input.

    Args:
        path: A safetensors file, or the conditioning.npz of a bundle.
    Raises:
        LoadError: the file is missing or of another format.
    """
    if path.suffix == ".npz":
        arrays = {name: _tensor(name, value, path) for name, value in read_arrays(path).items()}
    else:
        try:
            arrays = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
    return PromptSet(
        {name: value for name, value in arrays.items() if not name.endswith(UNCONDITIONAL)},
        {name.removesuffix(UNCONDITIONAL): value for name, value in arrays.items() if name.endswith(UNCONDITIONAL)},
        guidance_scale,
    )


def read_stored(data: Any, path: Path) -> PromptSet:
    """The conditioning of a ``model.pt``.

    Raises:
        LoadError: it is no conditioning.
    """
    stored: dict[str, Any] = data if isinstance(data, dict) else {"examples": None}
    examples: Any = stored.get("examples", {})
    unconditional: Any = stored.get("unconditional", {})
    scale = stored.get("guidance_scale")
    number = scale is None or (isinstance(scale, int | float) and not isinstance(scale, bool))
    if not (number and _are_tensors(examples) and _are_tensors(unconditional)):
        raise LoadError(f"{path}: its conditioning is not examples and unconditional values by name; pack it again")
    return PromptSet(examples, unconditional, scale)


def _tensor(name: str, value: NDArray[np.generic], path: Path) -> Tensor:
    if value.dtype.kind not in "fiub":
        raise LoadError(f"{path}: {name} holds {value.dtype}, not numbers; store the embeddings")
    return torch.from_numpy(value)


def _are_tensors(group: Any) -> bool:
    return isinstance(group, dict) and all(isinstance(value, Tensor) for value in group.values())


def _require_known(names: list[str], shapes: Mapping[str, object], where: str) -> None:
    for name in names:
        if name in shapes:
            continue
        meant = OF_PIPELINES.get(name.removeprefix("negative_"), next(iter(shapes)))
        if name.startswith("negative"):
            meant += UNCONDITIONAL
        raise LoadError(
            f"{where}: the conditioning holds {name!r}, which is no input of the model; it takes "
            f"{', '.join(shapes)}, and beside each NAME{UNCONDITIONAL}; did you mean {meant}?"
        )


def _null(name: str, value: Tensor, examples: Tensor, where: str) -> Tensor:
    """A "no prompt" value without a batch axis, of the shape of one example."""
    wanted = examples.shape[1:]
    if value.shape == (1, *wanted):
        value = value[0]
    if value.shape != wanted:
        raise LoadError(
            f"{where}: {name}{UNCONDITIONAL} is {list(value.shape)}, one example is {list(wanted)}; encode both to the "
            "same length (pad the shorter one as your pipeline does), and leave the batch axis out"
        )
    return _finite(f"{name}{UNCONDITIONAL}", value.float(), where)


def _finite(name: str, value: Tensor, where: str) -> Tensor:
    if not value.isfinite().all():
        raise LoadError(f"{where}: {name} holds NaN or infinity; encode the prompts again")
    return value


def _fits(given: tuple[int, ...], shape: tuple[object, ...]) -> bool:
    return len(given) == len(shape) and all(
        not isinstance(size, int) or size == actual for size, actual in zip(shape, given, strict=True)
    )
