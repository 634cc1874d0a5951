"""What brings a quantized prediction nearer to the float one: a row per timestep, a few numbers per channel."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import RecipeError

IDENTITY = (1.0, 0.0, 0.0)
"""Gain, share of the sample and offset that change nothing."""
PARTS = len(IDENTITY)


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """``K e + L x + b`` in place of the prediction ``e`` for the sample ``x``, per timestep and channel.

    Attributes:
        rows: K, L and b, float32 [T, 3, C]; ``IDENTITY`` where nothing is corrected.
        outputs: Kinds of layer whose output had a grid when it was fitted; where others have one, errors are others.
    """

    rows: NDArray[np.float32]
    outputs: frozenset[str]

    def __post_init__(self) -> None:
        if self.rows.ndim != 3 or self.rows.shape[1] != PARTS or not self.rows.size:
            raise RecipeError(
                f"the correction has a gain, a share of the sample and an offset for each timestep and channel, got "
                f"{list(self.rows.shape)}"
            )
        if self.rows.dtype != np.float32 or not np.isfinite(self.rows).all():
            raise RecipeError("the correction must be finite float32 numbers")

    @property
    def corrected(self) -> int:
        """Timesteps that are not left as they are."""
        return int((self.rows != np.asarray(IDENTITY, np.float32).reshape(PARTS, 1)).any((1, 2)).sum())
