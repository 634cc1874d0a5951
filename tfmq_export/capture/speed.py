"""How fast this machine computes, measured in a blink: what a forecast of long work is made of."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIDE = 512  # of the matrices
VALUES = 1 << 21  # of a vector
TRIES = 4


@dataclass(frozen=True, slots=True)
class Speed:
    """What a second holds, with as many threads as torch uses.

    Attributes:
        macs: Multiply-accumulates of large float32 matrix products.
        values: Float32 values that are scaled, rounded, clamped, subtracted, raised to a power and added up.
    """

    macs: float
    values: float


@torch.no_grad()
def measured_speed() -> Speed:
    """The middle of a few tries on the CPU, other work beside it included; a fraction of a second."""
    matrix, vector = torch.ones(SIDE, SIDE), torch.linspace(0, 1, VALUES)

    def rounds() -> object:
        return vector.mul(1.1).round_().clamp_(-5, 5).sub_(vector).abs_().pow_(2.4).sum()

    return Speed(SIDE**3 / _usual(lambda: matrix @ matrix), VALUES / _usual(rounds))


def _usual(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[TRIES // 2]
