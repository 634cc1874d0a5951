"""The pair rule: weights that cannot saturate a kernel's sums, whatever the inputs are.

x86 CPUs without VNNI multiply u8 by s8 with ``vpmaddubsw``, which adds two neighbouring products in 16 bits:

    saturate16(x1 w1 + x2 w2)  ==  x1 w1 + x2 w2    for all x in 0..255    <==    |w1 + w2| <= 128 where signs agree

since 255 * 128 < 2**15. Neighbours are the input channels 2j and 2j + 1 at one position of the kernel, the order in
which ONNX Runtime and OpenVINO add (docs/lowering.md). Where that order differs between them, with an odd number of
channels, every weight is its own neighbour and stays within 64, which keeps the rule in any order; so is the last
weight of an odd row that has no other.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIR_SUM = 128
"""Largest sum of two neighbouring integers of one sign."""

SAFE_WEIGHT_BITS = 7
"""Integers of so few bits keep the rule by themselves: 2 * 64 <= 128."""

SAFE_INPUT_BITS = 7
"""Codes of so few bits keep any two weights within 16 bits: 127 * 2 * 128 < 2**15."""


def partners(shape: Sequence[int], groups: int = 1, codes: int = 1) -> NDArray[np.int64] | None:
    """The neighbour of every weight of one output channel, [in / groups * kernel]; an involution.

    Args:
        shape: Of the weight, [out, in / groups, *kernel].
        codes: Of the input: how many copies of the channels the kernel reads one behind the other.
    Returns:
        None for a depthwise convolution, which kernels sum in 32 bits.
    """
    outputs, channels, *kernel = shape
    if channels == 1 and outputs == groups > 1:
        return None
    positions = math.prod(kernel)
    neighbour = np.arange(channels)
    if channels % 2 == 0:
        neighbour ^= 1
    elif positions == 1 and codes == 1:
        neighbour[:-1] ^= 1
    return (neighbour[:, None] * positions + np.arange(positions)).reshape(-1)


def largest_pair(weight: NDArray[np.integer], neighbours: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest sum of two neighbours of one sign in each output channel, [out].

    Args:
        weight: Integers, [out, ...].
        neighbours: From ``partners``.
    """
    return np.asarray(pair_sums(weight.reshape(len(weight), -1).astype(np.int64), neighbours).max(1, initial=0))


def within_pairs(steps: NDArray[np.floating], neighbours: NDArray[np.int64]) -> NDArray[np.floating]:
    """Real weights that keep the rule, the nearest inside the grid: what a pair has too much, both give up alike.

    Args:
        steps: In steps of the grid, [out, n].
    """
    excess = np.maximum(pair_sums(steps, neighbours) - PAIR_SUM, 0) / 2
    return np.asarray(np.sign(steps) * np.maximum(np.abs(steps) - excess, 0))


def pair_sums(rows: NDArray[Any], neighbours: NDArray[np.int64]) -> NDArray[Any]:
    """What each weight and its neighbour add up to where their signs agree, else 0; [out, n] like ``rows``."""
    other = rows[:, neighbours]
    return np.asarray(np.where(rows * other > 0, np.abs(rows + other), 0))
