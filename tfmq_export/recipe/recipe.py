"""The recipe: everything quantization decided, as plain arrays.

It separates PyTorch from ONNX: PyTorch code writes it; graph passes and runtimes read it and use no
PyTorch. ``recipe/io.py`` saves it and loads it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.names import half_name
from tfmq_export.recipe.pairs import SAFE_INPUT_BITS, largest_pair, partners
from tfmq_export.recipe.stored_layer import StoredLayer, check_codes
from tfmq_export.recipe.timesteps import TimestepSet

TableType = Literal["fp32", "fp16", "int8"]
"""What the rows of temporal tables are stored in."""

WEIGHT_REACH = 2  # steps between a weight and its code: rounding errors cancel, and a recipe still knows its model
MIN_EXPONENT = -4  # a 4-bit weight shifted by 4 still fits 8 bits


@dataclass(frozen=True, slots=True, eq=False)
class TimestepGrids:
    """A grid for each timestep of the finite set (FSC; TFMQ-DM, section 4.2).

    Attributes:
        scale: float32, [T].
        zero_point: int32, [T].
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.scale.ndim != 1 or self.scale.shape != self.zero_point.shape:
            raise RecipeError(f"a finite set needs a scale and a zero point per timestep, got {self.scale.shape}")
        if self.scale.dtype != np.float32 or self.zero_point.dtype != np.int32:
            raise RecipeError("scales must be float32 and zero points int32")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise RecipeError("every scale must be positive and finite")


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecipe:
    """One quantized convolution or linear layer.

    It computes ``sum_k x^_k 2^d_k W^_k`` where ``x^ = fake_quantize(x / (tau 2^d), input)``.

    Attributes:
        name: The value this layer computes in the graph.
        path: Its module path, for people.
        kind: "conv" or "linear".
        macs: Multiply-accumulates for one sample.
        weight: Grid of ``tau W``, one scale per output channel (axis 0), zero point 0.
        weight_codes: Rounded ``tau W``, int8, [out, in / groups, *kernel] or [out, in]; at most ``WEIGHT_REACH`` steps
            from the weight, brought to the ends of the grid and within its pairs.
        input: Grid of the scaled input activation, one scale per tensor.
        output: Grid the target puts on the output, or None where it stays float.
        groups: Of a convolution.
        les_scale: tau of learned equivalent scaling, float32 [in]; None where it is 1 (DMQ, section 3.2).
        pts_exponent: d of power-of-two scaling, int8 [in], all at most 0; None where it is 0 (DMQ, section 3.4).
        input_by_timestep: Grids in place of ``input``'s, one per timestep (TFMQ-DM, section 4.2).
        output_by_timestep: The same for ``output``.
        chosen: Why it has its bits, where the preset did not say; for people.
    """

    name: str
    path: str
    kind: str
    macs: int
    weight: QParams
    weight_codes: NDArray[np.int8]
    input: QParams
    output: QParams | None
    groups: int = 1
    les_scale: NDArray[np.float32] | None = None
    pts_exponent: NDArray[np.int8] | None = None
    input_by_timestep: TimestepGrids | None = None
    output_by_timestep: TimestepGrids | None = None
    chosen: str = ""

    def __post_init__(self) -> None:
        check_codes(self.path, self.kind, self.weight, self.weight_codes)
        for grid in (self.input, self.output):
            if grid is not None and (grid.spec.signed or grid.spec.axis is not None):
                raise RecipeError(f"{self.path}: activations need an unsigned grid with one scale")
        channels = (self.weight_codes.shape[1] * self.groups,)
        if self.les_scale is not None:
            if self.les_scale.shape != channels or self.les_scale.dtype != np.float32:
                raise RecipeError(f"{self.path}: LES needs a float32 factor per input channel")
            if not (np.isfinite(self.les_scale).all() and (self.les_scale > 0).all()):
                raise RecipeError(f"{self.path}: every LES factor must be positive and finite")
        if self.pts_exponent is not None:
            if self.pts_exponent.shape != channels or self.pts_exponent.dtype != np.int8:
                raise RecipeError(f"{self.path}: PTS needs an int8 exponent per input channel")
            if self.pts_exponent.max() > 0 or self.pts_exponent.min() < MIN_EXPONENT:
                raise RecipeError(f"{self.path}: PTS exponents must be in {MIN_EXPONENT}..0")
        if self.weight.spec.pair_sum is not None and self.largest_pair > self.weight.spec.pair_sum:
            raise RecipeError(
                f"{self.path}: two neighbouring weights add up to {self.largest_pair}, their grid says "
                f"{self.weight.spec.pair_sum}"
            )

    @property
    def neighbours(self) -> NDArray[np.int64] | None:
        """The neighbour of each weight of an output channel (``pairs.py``); None where kernels sum in 32 bits."""
        return partners(self.weight_codes.shape, self.groups, self.input.spec.codes)

    @property
    def largest_pair(self) -> int:
        """The largest sum of two neighbouring integers of one sign, shifted by PTS; 0 where none can saturate."""
        if self.neighbours is None or self.input.spec.bits <= SAFE_INPUT_BITS:
            return 0
        return int(largest_pair(self.shifted_codes, self.neighbours).max(initial=0))

    @property
    def weight_factor(self) -> NDArray[np.float64]:
        """``tau 2^d``: what every input channel of the weight is multiplied by, [in]; of rank 0 where it is 1."""
        tau = np.ones((), np.float64) if self.les_scale is None else self.les_scale.astype(np.float64)
        shift = np.zeros((), np.int8) if self.pts_exponent is None else self.pts_exponent
        return np.asarray(tau * np.exp2(shift.astype(np.float64)))

    @property
    def input_factor(self) -> NDArray[np.float32] | None:
        """``1 / (tau 2^d)``: what every input channel is multiplied by, [in]; None where it is 1."""
        if self.les_scale is None and self.pts_exponent is None:
            return None
        return (1 / self.weight_factor).astype(np.float32)

    @property
    def weight_step(self) -> NDArray[np.float32]:
        """Real value of one step of the integers shifted by PTS, ``scale 2^(min d)``, [out]."""
        if self.pts_exponent is None:
            return self.weight.scale
        return self.weight.scale * np.float32(2.0 ** int(self.pts_exponent.min()))

    @property
    def weight_shifts(self) -> NDArray[np.int32]:
        """What power-of-two scaling multiplies the integers by, ``2^(d_k - min d)``; broadcasts against the codes."""
        codes = self.weight_codes
        exponent = np.zeros(codes.shape[1] * self.groups, np.int32) if self.pts_exponent is None else self.pts_exponent
        shifts = np.exp2(exponent.astype(np.int32) - int(exponent.min())).astype(np.int32)  # [in]
        by_output = np.repeat(shifts.reshape(self.groups, -1), len(codes) // self.groups, axis=0)
        rows = by_output[:1] if self.groups == 1 else by_output
        return rows.reshape(*rows.shape, *[1] * (codes.ndim - 2))

    @property
    def shifted_codes(self) -> NDArray[np.int32]:
        """The weight's integers with power-of-two scaling in them; ``weight_step`` is what one of them is worth."""
        return self.weight_codes.astype(np.int32) * self.weight_shifts


@dataclass(frozen=True, slots=True, eq=False)
class ProductRecipe:
    """One product of two activations inside attention: ``q k^T`` or ``p v``.

    It computes ``fake_quantize(a, left) fake_quantize(b, right)``. Neither grid has a zero point: the constant part of
    one factor would have to be multiplied by the sums of the other, at run time.

    Attributes:
        name: The value it computes in the graph.
        path: Module path of the attention, for people.
        macs: Multiply-accumulates for one sample.
        left: Grid of the first factor; unsigned for a softmax.
        right: Of the second.
    """

    name: str
    path: str
    macs: int
    left: QParams
    right: QParams

    def __post_init__(self) -> None:
        for grid in (self.left, self.right):
            if grid.spec.axis is not None or grid.spec.codes != 1:
                raise RecipeError(f"{self.path}: a factor of a product needs one scale and one code")
            if grid.zero_point.any():
                raise RecipeError(f"{self.path}: zero points of a product's factors must be 0")
        if not self.right.spec.signed:
            raise RecipeError(f"{self.path}: the second factor of a product needs a signed grid")


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
        rows_per_sample: Of the batch axis: the frames of a video, where time is repeated for each. Above 1, ``rows``
            is [T, rows_per_sample, *feature], or [T, 1, *feature] where they are all equal.
    """

    name: str
    path: str
    rows: NDArray[np.float32]
    per_sample: bool
    rows_per_sample: int = 1

    def __post_init__(self) -> None:
        if self.rows.dtype != np.float32:
            raise RecipeError(f"{self.path}: a table must be float32, got {self.rows.dtype}")
        if self.rows_per_sample > 1 and (self.rows.ndim < 2 or self.rows.shape[1] not in (1, self.rows_per_sample)):
            raise RecipeError(
                f"{self.path}: {self.rows_per_sample} rows per sample, but a table of shape {list(self.rows.shape)}"
            )

    @property
    def unfolded(self) -> NDArray[np.float32]:
        """The rows with every row of a sample written out: [T, rows_per_sample, *feature], or [T, *feature] for one."""
        if self.rows_per_sample == 1:
            return self.rows
        return np.broadcast_to(self.rows, (len(self.rows), self.rows_per_sample, *self.rows.shape[2:]))


@dataclass(frozen=True, slots=True, eq=False)
class TibRecipe:
    """The temporal information block as lookup tables.

    Attributes:
        source: What the rows are: "table" (full precision), "quantized" (the quantized block) or "select".
        stored: What a target's graph keeps them in: "fp32", "fp16" or "int8" (``narrow_rows.py``).
    """

    timesteps: TimestepSet
    tables: tuple[TemporalTable, ...]
    source: str = "table"
    stored: TableType = "fp32"

    def __post_init__(self) -> None:
        for table in self.tables:
            if table.rows.shape[0] != len(self.timesteps):
                raise RecipeError(f"{table.path}: {table.rows.shape[0]} rows for {len(self.timesteps)} timesteps")
            if not np.isfinite(table.rows).all():
                raise RecipeError(f"{table.path}: the temporal table holds NaN or infinity")

    @property
    def names(self) -> frozenset[str]:
        """The graph values that tables replace."""
        return frozenset(table.name for table in self.tables)

    @property
    def nbytes(self) -> int:
        return sum(table.rows.nbytes for table in self.tables)


@dataclass(frozen=True, slots=True)
class SkipSplit:
    """A layer on a concatenation ``[h | skip]``, computed as one layer per half and a sum (DMQ, section 3.4).

    Attributes:
        name: The value of the whole layer; its halves are ``name_part0``, ``name_part1``, ...
        sizes: Input channels of each half.
    """

    name: str
    sizes: tuple[int, ...]

    def part(self, index: int) -> str:
        """The value that one half computes."""
        return half_name(self.name, index)


@dataclass(frozen=True, slots=True, eq=False)
class QuantRecipe:
    """What quantization decided about one model.

    Attributes:
        fingerprint: Hash of the captured model; a recipe binds to no other.
        preset: Name of the preset it was made with.
        macs: Multiply-accumulates of the whole model for one sample, attention included.
        splits: Layers on concatenations that are split.
        products: Of attention, where both their factors are on grids.
        stored: Layers that compute in floating point from weights that are stored as integers.
        correction: Of the prediction; None where it is left as it is.
        provenance: How it was made: versions, seed, calibration size; strings for people.
    """

    fingerprint: str
    preset: str
    layers: tuple[LayerRecipe, ...]
    kept_float: tuple[FloatLayer, ...]
    tib: TibRecipe
    macs: int
    provenance: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[SkipSplit, ...] = ()
    products: tuple[ProductRecipe, ...] = ()
    stored: tuple[StoredLayer, ...] = ()
    correction: Correction | None = None

    def __post_init__(self) -> None:
        if self.correction is not None and len(self.correction.rows) != len(self.tib.timesteps):
            raise RecipeError(
                f"the correction has {len(self.correction.rows)} rows for {len(self.tib.timesteps)} timesteps"
            )

    def __repr__(self) -> str:
        return f"QuantRecipe({self.preset}, {len(self.layers)} layers, {len(self.kept_float)} in floating point)"

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates that quantized layers and products hold."""
        integer = sum(layer.macs for layer in self.layers) + sum(product.macs for product in self.products)
        return integer / self.macs if self.macs else 0.0
