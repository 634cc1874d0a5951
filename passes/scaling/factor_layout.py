"""Follow a factor backwards through operations that only move numbers around.

A factor has the rank of the value it multiplies, and size 1 on every axis it does not depend on. Each function
takes the factor of a result and returns the one of the operation's input that says the same.
"""

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from tfmq_export.passes.reading import Shape

Factor = NDArray[np.float32]


def before_transpose(factor: Factor, order: Sequence[int] | None) -> Factor:
    """Args: order: The Transpose's ``perm``; None reverses the axes."""
    return factor.transpose(np.argsort(order if order is not None else range(factor.ndim)[::-1]))


def before_reshape(factor: Factor, after: Shape, before: Shape) -> Factor | None:
    """The factor on a value that was reshaped; None where the channels cannot be followed.

    The axes it depends on have to be static, and what lies behind them the same on both sides.

    Args:
        after: Shape of the result.
        before: Shape of the input.
    """
    if len(after) != factor.ndim or not before:
        return None
    axes = [axis for axis, size in enumerate(factor.shape) if size != 1]
    if not axes:
        return np.full([1] * len(before), factor.reshape(-1)[0], np.float32)
    # The narrowest run of axes around those that holds as many elements as a run of axes before.
    runs = [(first, end) for first in range(axes[0], -1, -1) for end in range(axes[-1] + 1, factor.ndim + 1)]
    spans = [(start, stop) for start in range(len(before)) for stop in range(start + 1, len(before) + 1)]
    for (first, end), (start, stop) in product(runs, spans):
        own, taken = _static(after[first:end]), _static(before[start:stop])
        if own is None or taken is None or prod(own) != prod(taken) or not _equal(after[end:], before[stop:]):
            continue
        full = np.broadcast_to(factor.reshape(factor.shape[first:end]), own).reshape(taken)
        return _collapsed(full.reshape(*[1] * start, *taken, *[1] * (len(before) - stop)))
    return None


def before_split(factor: Factor, axis: int, sizes: Sequence[int], part: int) -> Factor:
    """The factor on the whole of which one part has a factor, and the others have none.

    Args:
        sizes: Of all parts along ``axis``.
        part: Which of them.
    """
    shapes = [[size if at == axis else own for at, own in enumerate(factor.shape)] for size in sizes]
    parts = [np.broadcast_to(factor if at == part else np.float32(1), shape) for at, shape in enumerate(shapes)]
    return np.concatenate(parts, axis)


def without_leading(factor: Factor, rank: int) -> Factor:
    """Drop leading axes of size 1 as long as there are more axes than ``rank``."""
    while factor.ndim > rank and factor.shape[0] == 1:
        factor = factor[0]
    return factor


def _static(sizes: Shape) -> list[int] | None:
    static = [size for size in sizes if isinstance(size, int)]
    return static if len(static) == len(sizes) else None


def _equal(one: Shape, other: Shape) -> bool:
    """Whether axes hold equally many elements; named ones have to appear on both sides."""
    if not all((*one, *other)):
        return False
    sizes = [prod(size for size in axes if isinstance(size, int)) for axes in (one, other)]
    names = [sorted(size for size in axes if isinstance(size, str)) for axes in (one, other)]
    return sizes[0] == sizes[1] and names[0] == names[1]


def _collapsed(factor: Factor) -> Factor:
    """Size 1 on every axis along which nothing changes."""
    for axis in range(factor.ndim):
        first = factor.take([0], axis)
        factor = first if (factor == first).all() else factor
    return factor
