"""The recipe: everything quantization decided, as plain arrays.

It is the waist of the compiler. PyTorch code writes it; graph passes and runtimes read it and know
no PyTorch. ``recipe_io`` saves it and loads it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import RecipeError
from tfmq_export.spec import QParams
from tfmq_export.timesteps import TimestepSet


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecipe:
    """One quantized convolution or linear layer.

    Attributes:
        name: The value this layer computes in the graph.
        path: Its module path, for people.
        kind: "conv" or "linear".
        macs: Multiply-accumulates for one sample.
        weight: Grid of the weight, one scale per output channel (axis 0), zero point 0.
        weight_codes: Rounded weight, int8, [out, in / groups, *kernel] or [out, in].
        input: Grid of the input activation, one scale per tensor.
        output: Grid the target puts on the output, or None where it stays float.
    """

    name: str
    path: str
    kind: str
    macs: int
    weight: QParams
    weight_codes: NDArray[np.int8]
    input: QParams
    output: QParams | None

    def __post_init__(self) -> None:
        if self.kind not in ("conv", "linear"):
            raise RecipeError(f"{self.path}: unknown kind of layer {self.kind!r}")
        if self.weight_codes.dtype != np.int8:
            raise RecipeError(f"{self.path}: weight codes must be int8, got {self.weight_codes.dtype}")
        if self.weight.scale.shape != self.weight_codes.shape[:1] or self.weight.spec.axis != 0:
            raise RecipeError(f"{self.path}: a weight needs one scale per output channel")
        if self.weight.zero_point.any():
            raise RecipeError(f"{self.path}: weight zero points must be 0")
        if self.weight_codes.min() < self.weight.spec.qmin or self.weight_codes.max() > self.weight.spec.qmax:
            raise RecipeError(f"{self.path}: weight codes leave the {self.weight.spec.bits}-bit grid")
        for grid in (self.input, self.output):
            if grid is not None and (grid.spec.signed or grid.spec.axis is not None):
                raise RecipeError(f"{self.path}: activations need an unsigned grid with one scale")


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """A layer that computes in floating point, and why.

    Attributes:
        macs: Multiply-accumulates for one sample.
    """

    name: str
    path: str
    macs: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class TemporalTable:
    """Every value one temporal feature takes (TFMQ-DM, section 3).

    Attributes:
        name: The graph value that the table replaces.
        path: Module path of the operation that computed it.
        rows: float32, [T, *feature]; one row per timestep of the set.
        per_sample: Whether the graph value has a batch axis in front of ``feature``.
    """

    name: str
    path: str
    rows: NDArray[np.float32]
    per_sample: bool

    def __post_init__(self) -> None:
        if self.rows.dtype != np.float32:
            raise RecipeError(f"{self.path}: a table must be float32, got {self.rows.dtype}")


@dataclass(frozen=True, slots=True, eq=False)
class TibRecipe:
    """The temporal information block as lookup tables."""

    timesteps: TimestepSet
    tables: tuple[TemporalTable, ...]

    def __post_init__(self) -> None:
        for table in self.tables:
            if table.rows.shape[0] != len(self.timesteps):
                raise RecipeError(f"{table.path}: {table.rows.shape[0]} rows for {len(self.timesteps)} timesteps")
            if not np.isfinite(table.rows).all():
                raise RecipeError(f"{table.path}: the temporal table holds NaN or infinity")

    @property
    def nbytes(self) -> int:
        return sum(table.rows.nbytes for table in self.tables)


@dataclass(frozen=True, slots=True, eq=False)
class QuantRecipe:
    """What quantization decided about one model.

    Attributes:
        fingerprint: Hash of the captured model; a recipe binds to no other.
        preset: Name of the preset it was made with.
        macs: Multiply-accumulates of the whole model for one sample, attention included.
        provenance: How it was made: versions, seed, calibration size; strings for people.
    """

    fingerprint: str
    preset: str
    layers: tuple[LayerRecipe, ...]
    kept_float: tuple[FloatLayer, ...]
    tib: TibRecipe
    macs: int
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates that quantized layers hold."""
        return sum(layer.macs for layer in self.layers) / self.macs if self.macs else 0.0

    @property
    def mean_weight_bits(self) -> float:
        """Stored bits per quantized weight."""
        counts = [layer.weight_codes.size for layer in self.layers]
        bits = [layer.weight.spec.bits for layer in self.layers]
        return float(np.average(bits, weights=counts)) if counts else 32.0
