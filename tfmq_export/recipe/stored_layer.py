"""A layer that is stored in few bits and computes in floating point.

It takes the room of a quantized layer and has the noise of its weights alone: no activation is rounded for it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.grid import QParams


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """A layer whose weight is stored as integers.

    Attributes:
        name: The value this layer computes in the graph.
        path: Its module path, for people.
        kind: "conv" or "linear".
        macs: Multiply-accumulates for one sample.
        weight: Grid of the weight, one scale per output channel (axis 0), zero point 0.
        weight_codes: The rounded weight, int8, [out, in / groups, *kernel] or [out, in].
        reason: Why it computes in floating point, for people.
        chosen: Why it has its bits, for people.
    """

    name: str
    path: str
    kind: str
    macs: int
    weight: QParams
    weight_codes: NDArray[np.int8]
    reason: str
    chosen: str = ""

    def __post_init__(self) -> None:
        check_codes(self.path, self.kind, self.weight, self.weight_codes)

    @property
    def real(self) -> NDArray[np.float32]:
        """The weight that the layer computes with."""
        scale = self.weight.scale.reshape(-1, *[1] * (self.weight_codes.ndim - 1))
        return np.asarray(self.weight_codes.astype(np.float32) * scale)


def check_codes(path: str, kind: str, weight: QParams, codes: NDArray[np.int8]) -> None:
    """Refuse a layer of no known kind, or a weight whose grid does not hold its integers.

    Raises:
        RecipeError: says of which layer.
    """
    if kind not in ("conv", "linear"):
        raise RecipeError(f"{path}: unknown kind of layer {kind!r}")
    if codes.dtype != np.int8:
        raise RecipeError(f"{path}: weight codes must be int8, got {codes.dtype}")
    if weight.scale.shape != codes.shape[:1] or weight.spec.axis != 0:
        raise RecipeError(f"{path}: a weight needs one scale per output channel")
    if weight.zero_point.any():
        raise RecipeError(f"{path}: weight zero points must be 0")
    if codes.min() < weight.spec.qmin or codes.max() > weight.spec.qmax:
        raise RecipeError(f"{path}: weight codes leave the {weight.spec.bits}-bit grid")
