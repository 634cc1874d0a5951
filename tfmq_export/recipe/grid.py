"""Integer grids and their parameters."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.pairs import PAIR_SUM

MOST_CODES = 256
"""As many 8-bit integers as together resolve what a 16-bit one does."""
WIDE = 16
"""Bits of an activation's grid on engines that have such kernels; beside 2 to 8 there is no other width."""


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A uniform integer grid.

    Attributes:
        bits: Width of the integer, 2 to 8, or 16. Engines store widths below 8 in 8-bit codes.
        signed: Whether the grid is centred on zero.
        axis: Channel axis that owns its own scale; None means one scale per tensor.
        codes: Integers that add up to one value, for the few values that a single one resolves too coarsely.
        pair_sum: Largest sum of two neighbouring weights of one sign (``pairs.py``); None where any will do.
    """

    bits: int
    signed: bool = True
    axis: int | None = None
    codes: int = 1
    pair_sum: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 and self.bits != WIDE:
            raise RecipeError(f"bits must be in 2..8, or {WIDE}, got {self.bits}")
        if self.bits == WIDE and (self.codes != 1 or self.axis is not None):
            raise RecipeError(f"{WIDE} bits are for activations, in one code; got {self.codes} codes, axis {self.axis}")
        if not 1 <= self.codes <= (1 if self.signed else MOST_CODES):
            raise RecipeError(f"codes must be at least 1, and 1 on a signed grid (of {MOST_CODES}), got {self.codes}")
        if self.pair_sum is not None and (self.axis is None or self.pair_sum != PAIR_SUM):
            raise RecipeError(f"only weights have pairs, and of {PAIR_SUM}; got {self.pair_sum} with axis {self.axis}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else self.codes * ((1 << self.bits) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """A grid laid over real numbers: ``real = scale * (code - zero_point)``.

    Attributes:
        spec: The grid.
        scale: float32, shape () or [channels].
        zero_point: int32, the shape of ``scale``; inside the grid.
    """

    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.scale.dtype != np.float32 or self.zero_point.dtype != np.int32:
            raise RecipeError(
                f"scale must be float32 and zero_point int32, got {self.scale.dtype} and {self.zero_point.dtype}"
            )
        if self.scale.ndim != (0 if self.spec.axis is None else 1):
            raise RecipeError(f"a grid with axis {self.spec.axis} cannot have a scale of shape {self.scale.shape}")
        if self.scale.shape != self.zero_point.shape:
            raise RecipeError(f"scale {self.scale.shape} and zero_point {self.zero_point.shape} differ in shape")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise RecipeError("every scale must be positive and finite")
        if (self.zero_point < self.spec.qmin).any() or (self.zero_point > self.spec.qmax).any():
            raise RecipeError(f"zero point outside {self.spec.qmin}..{self.spec.qmax}")

    def same_as(self, other: "QParams") -> bool:
        """Whether both lay the same grid over the same numbers."""
        return (
            self.spec == other.spec
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )
