"""How a model's own ``forward`` is called, as the manifest tells it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LeafPath = tuple[str | int, ...]
"""Name of an argument, and behind it the keys and positions inside."""


def written(path: LeafPath) -> str:
    """A path as people write it: ``added_cond_kwargs['text_embeds']``."""
    first, *rest = path
    return str(first) + "".join(f"[{key!r}]" for key in rest)


@dataclass(frozen=True, slots=True)
class LeafInfo:
    """A value inside the arguments of a call of the model's own ``forward``.

    Attributes:
        path: Name of the argument, and behind it the keys and positions inside.
        input: Name of the graph's input that it is; empty for a constant of the graph.
        fold: Rows of the value for each row of the sample; 0 where it has no such axis.
        axis: Where these rows are.
        constant: Of a constant, ``fingerprint_of`` its value.
        listed: Whether it is a list with a tensor for each row; those of one shape are rows of one batch.
        counts: Of a mask of a prompt's tokens, which the graph takes without padding: the input with the tokens.
    """

    path: tuple[str | int, ...]
    input: str = ""
    fold: int = 0
    axis: int = 0
    constant: str = ""
    listed: bool = False
    counts: str = ""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """How the model's own ``forward`` is called, so that the graph can stand in its place.

    Attributes:
        leaves: All values inside the arguments, in the order of the arguments.
        rows_per_image: Rows of the sample for each image: 2 where guidance puts both halves in one call; 0 unknown.
        calls_per_step: Calls of the model at each timestep: 2 where each half of guidance is a call of its own.
        together: How many images may be drawn in one run.
    """

    leaves: tuple[LeafInfo, ...]
    rows_per_image: int = 0
    calls_per_step: int = 1
    together: int = 1


def of_one_shape(lists: Sequence[Sequence[Any]]) -> list[slice]:
    """Which neighbouring rows can be computed together: those of one shape in every list.

    Args:
        lists: A tensor for each row, [...].
    """
    shapes = [tuple(tuple(value.shape) for value in row) for row in zip(*lists, strict=True)]
    starts = [row for row, shape in enumerate(shapes) if row == 0 or shape != shapes[row - 1]]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(shapes)], strict=True)]


def fingerprint_of(value: object) -> str:
    """Tells one constant argument from another, whatever floating-point type an array has."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    array = np.ascontiguousarray(value, np.float64 if value.dtype.kind == "f" else value.dtype)
    digest = hashlib.sha256(f"{array.dtype.kind} {array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()[:16]
