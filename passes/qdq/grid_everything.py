"""Put a grid of 16 bits on every value that still is a real number.

    node -> y                 ==>    node -> QuantizeLinear(u16) -> DequantizeLinear -> y's readers
    node(constant)            ==>    node(DequantizeLinear(u16 codes))

For engines that compute in integers alone: each node reads integers and writes them. Layers have the recipe's grids
already, so what they write is read through a second grid, which changes the type (``Convert``) and no number by more
than half a 16-bit step. The intervals come from outside: measured on the model's own trajectory.

Some operations leave no choice. What only moves numbers keeps the grid of its input; a sigmoid, a softmax and a tanh
have the grid of their whole range; a norm takes a scale of 8 bits and a bias of 32; a linear layer that stays off the
recipe, such as a modulation, takes weights of 8 bits; a convolution of each channel with one number, as ``SpellAffine``
makes it, has that number for its scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import computed, constant_values, element_type

Interval = tuple[float, float]

LEVELS = (1 << 16) - 1
TINY = float(np.finfo(np.float32).tiny)
MARGIN = 1.5
"""Of the widest value seen: 16 bits can spare half of one for inputs that calibration did not bring."""
FINER = 257
"""Steps of a 16-bit grid in one of 8 bits over the same interval: (2^16 - 1) / (2^8 - 1), so that none is rounded."""
LARGEST = 1e6
"""Beyond it a value is no activation but a mask, whose grid would leave nothing of what it is added to."""

MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Expand", "Gather", "Identity"}
    | {"Tile", "DepthToSpace", "SpaceToDepth", "MaxPool"}
)
WHOLE_RANGE = {"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
PLAIN_CONSTANTS = frozenset({"Resize", "Pad", "Clip", "Equal"})
"""Operations whose constants are parameters: sizes, limits, what is compared with."""
LARGEST_CODE = 127  # of a weight
NORMS = frozenset({"InstanceNormalization", "LayerNormalization"})
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class WideGrid:
    """A grid of unsigned 16-bit codes."""

    scale: np.float32
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> "WideGrid":
        """The grid of an interval, 0 among its numbers."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32(max((high - low) / LEVELS, TINY) if high > low else 1.0)
        return cls(scale, int(np.clip(round(-low / float(scale)), 0, LEVELS)))

    @classmethod
    def of_operation(cls, op: str, low: float, high: float) -> "WideGrid":
        """The grid of a result that was seen in an interval."""
        if op not in WHOLE_RANGE:
            return cls.over(low * MARGIN, high * MARGIN)
        low, high = WHOLE_RANGE[op]
        # As engines lay it: powers of two, so that the largest number is one step below the end.
        return cls(np.float32((high - low) / (LEVELS + 1)), 0 if low == 0 else (LEVELS + 1) // 2)

    def codes(self, values: NDArray[np.float64]) -> NDArray[np.uint16]:
        """Numbers rounded to the grid."""
        return (np.round(values / np.float64(self.scale)) + self.zero_point).clip(0, LEVELS).astype(np.uint16)


@dataclass(frozen=True)
class GridEverything(Pass):
    """Quantize whatever the passes before left in floating point.

    Attributes:
        intervals: Lowest and highest number of every float value that the graph computes, by name.
    """

    intervals: Mapping[str, Interval]
    semantics: ClassVar[Semantics] = Semantics.ROUNDING

    def requires(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.op == "MatMul" and not _reads_eight_bits(node):
                raise PreconditionError(
                    f"{node.name}: the second factor of a product needs 8 bits; use --attention auto, "
                    "or leave no layer in floating point"
                )
        for name, (low, high) in self.intervals.items():
            if not (abs(low) < LARGEST and abs(high) < LARGEST):
                raise PreconditionError(
                    f"{name}: reaches from {low:g} to {high:g}, which no grid of 16 bits resolves; a mask of hidden "
                    "tokens has no lowering here"
                )

    def apply(self, graph: gs.Graph) -> Changes:
        graph.toposort()
        work = _Work(graph, self.intervals)
        for node in list(graph.nodes):
            if node.op not in _QUANTIZERS:
                layer = _is_layer(node)  # as the recipe made it: a product off the recipe looks like one once it read
                work.read_grids(node)
                work.write_grids(node, layer=layer)
        return Changes(tuple(work.gridded))

    def ensures(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.op in _QUANTIZERS:
                continue
            for value in node.outputs:
                if value.name in self.intervals and any(x.op != "QuantizeLinear" for x in value.outputs):
                    raise PostconditionError(f"{node.name}: its result {value.name} is read as a real number")


@dataclass
class _Work:
    """What is known while the nodes are visited in order.

    Attributes:
        grids: Of each value that a 16-bit grid was laid over, by the name of its dequantized twin.
        twins: That twin of a value on another grid, or none.
        gridded: Names of the values.
    """

    graph: gs.Graph
    intervals: Mapping[str, Interval]
    grids: dict[str, WideGrid] = field(default_factory=dict)
    twins: dict[str, gs.Tensor] = field(default_factory=dict)
    gridded: list[str] = field(default_factory=list)

    def read_grids(self, node: gs.Node) -> None:
        """Let a node read 16-bit grids; a layer reads its own already."""
        if node.op in ("Conv", "Gemm") and isinstance(node.inputs[1], gs.Constant):
            self._read_multiplier(node)
            return
        for position, value in enumerate(node.inputs):
            if isinstance(value, gs.Constant):
                if value.values.dtype == np.float32 and value.values.size and node.op not in PLAIN_CONSTANTS:
                    node.inputs[position] = self._stored(node, position, value)
            elif not value.inputs:
                if value.name in self.intervals:  # of the graph: what quantizes it goes on reading it
                    node.inputs[position] = self._twin(value)
            elif value.inputs[0].op == "DequantizeLinear" and not _is_layer(node):
                if _is_wide(value):
                    self.grids.setdefault(value.name, _grid_of(value.inputs[0]))
                else:
                    node.inputs[position] = self._twin(value)

    def _read_multiplier(self, node: gs.Node) -> None:
        """A product with stored numbers that is no layer: 8 bits for each channel of its result, the bias in 32.

        A convolution with one number for each channel rounds nothing: its code is 127, its scale the number's.
        """
        x, weight = node.inputs[:2]
        values = np.asarray(constant_values(weight), np.float64)
        axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
        channels = values.shape[axis]
        if node.op == "Conv" and values.size != channels:
            raise PreconditionError(f"{node.name}: computes in floating point, and nothing does here; quantize it")
        if any(node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            raise PreconditionError(f"{node.name}: a Gemm with factors has no lowering here")
        if x.inputs and x.inputs[0].op == "DequantizeLinear" and _is_wide(x):
            self.grids.setdefault(x.name, _grid_of(x.inputs[0]))
        else:
            x = self._twin(x)
        step = np.abs(np.moveaxis(values, axis, 0).reshape(channels, -1)).max(1) / LARGEST_CODE
        scale = np.where(step > 0, step, 1.0).astype(np.float32)
        steps = scale.astype(np.float64).reshape([-1 if place == axis else 1 for place in range(values.ndim)])
        codes = np.round(values / steps).clip(-LARGEST_CODE, LARGEST_CODE).astype(np.int8)
        node.inputs[0] = x
        node.inputs[1] = self._dequantized(weight.name, codes, scale, np.zeros(channels, np.int8), axis=axis)
        if len(node.inputs) > 2:
            sums = (self.grids[x.name].scale * scale).astype(np.float32)
            bias = np.asarray(constant_values(node.inputs[2]), np.float64).reshape(-1)
            start = np.round(bias / sums.astype(np.float64))
            limits = np.iinfo(np.int32)
            stored = start.clip(limits.min, limits.max).astype(np.int32)
            no_offset = np.zeros(channels, np.int32)
            node.inputs[2] = self._dequantized(node.inputs[2].name, stored, sums, no_offset, axis=0)

    def write_grids(self, node: gs.Node, *, layer: bool) -> None:
        """Quantize what a node computes, where its readers do not.

        Args:
            layer: Whether it writes the recipe's grid; what else reads 16 bits writes 16, whoever comes next.
        """
        for value in list(node.outputs):
            if value.name not in self.intervals:
                continue
            readers = value.outputs
            own = bool(readers) and all(reader.op == "QuantizeLinear" for reader in readers)
            given_out = any(value is output for output in self.graph.outputs)
            wanted = None if given_out else _wanted(value)
            if _moves(node) and wanted is not None and wanted != self.grids.get(node.inputs[0].name):
                # What moves numbers has one grid on both sides: the reader's, here.
                moved = variable(f"{value.name}.before", np.float32, node.inputs[0].shape)
                node.inputs[0] = self._quantize(node.inputs[0], moved, wanted, moved.name)
            if own and not given_out and (layer or (wanted is not None and node.op not in WHOLE_RANGE)):
                continue
            self._lay_over(node, value)

    def _lay_over(self, node: gs.Node, value: gs.Tensor) -> None:
        source = node.inputs[0].name
        if _moves(node) and source in self.grids:
            grid = self.grids[source]
        else:
            grid = WideGrid.of_operation(node.op, *self.intervals[value.name])
        raw = variable(f"{value.name}.real", np.float32, value.shape)
        node.outputs[[x is value for x in node.outputs].index(True)] = raw
        self._quantize(raw, value, grid, value.name)

    def _twin(self, value: gs.Tensor) -> gs.Tensor:
        """A value on a 16-bit grid of its own."""
        if value.name not in self.twins:
            twin = variable(f"{value.name}.wide", np.float32, value.shape)
            grid = WideGrid.of_operation("", *self.intervals[value.name])
            if value.inputs and _zero_point_type(value.inputs[0]) == np.uint8:
                narrow = _grid_of(value.inputs[0])
                grid = WideGrid(np.float32(narrow.scale / np.float32(FINER)), narrow.zero_point * FINER)
            self.twins[value.name] = self._quantize(value, twin, grid, twin.name)
        return self.twins[value.name]

    def _quantize(self, source: gs.Tensor, result: gs.Tensor, grid: WideGrid, prefix: str) -> gs.Tensor:
        codes = variable(f"{prefix}.wide_codes", np.uint16, source.shape)
        constants = _constants(grid, prefix)
        self.graph.nodes += [
            gs.Node("QuantizeLinear", f"{prefix}.wide_quantize", inputs=[source, *constants], outputs=[codes]),
            gs.Node("DequantizeLinear", f"{prefix}.wide_dequantize", None, [codes, *constants], [computed(result)]),
        ]
        self.grids[result.name] = grid
        self.gridded.append(prefix)
        return result

    def _stored(self, node: gs.Node, position: int, value: gs.Constant) -> gs.Tensor:
        """A constant on the grid that its reader wants."""
        values = np.asarray(constant_values(value), np.float64)
        of_norm = node.op in NORMS and position > 0
        key = f"{value.name}.{node.name}" if of_norm else value.name
        if key in self.twins:
            return self.twins[key]
        grid = WideGrid.over(float(values.min()), float(values.max()))
        scale = grid.scale
        zero_point: NDArray[np.generic] = np.asarray(grid.zero_point, np.uint16)
        codes: NDArray[np.generic] = grid.codes(values)
        if of_norm:
            scale, zero_point, codes = _of_norm(node, position, values, self._grid_read_by(node))
        dequantized = self._dequantized(key, codes, np.asarray(scale, np.float32), zero_point)
        self.twins[key] = dequantized
        if not of_norm:
            self.grids[dequantized.name] = grid
        return dequantized

    def _dequantized(
        self,
        key: str,
        codes: NDArray[np.generic],
        scale: NDArray[np.float32],
        zero_point: NDArray[np.generic],
        axis: int | None = None,
    ) -> gs.Variable:
        real = variable(f"{key}.dequantized", np.float32, codes.shape)
        parts = (("codes", codes), ("scale", scale), ("zero_point", zero_point))
        inputs = [constant(f"{key}.{part}", values) for part, values in parts]
        attrs: dict[str, object] = {} if axis is None else {"axis": axis}
        self.graph.nodes.append(gs.Node("DequantizeLinear", f"{key}.dequantize", attrs, inputs, [real]))
        return real

    def _grid_read_by(self, node: gs.Node) -> WideGrid:
        grid = self.grids.get(node.inputs[0].name)
        if grid is None:
            raise PreconditionError(f"{node.name}: reads {node.inputs[0].name}, which has no 16-bit grid")
        return grid


def _of_norm(
    node: gs.Node, position: int, values: NDArray[np.float64], read: WideGrid
) -> tuple[np.float32, NDArray[np.generic], NDArray[np.generic]]:
    """Scale, zero point and codes of a norm's scale (8 bits) or bias (32, in steps of the sums)."""
    largest = max(float(np.abs(values).max()), TINY)
    if position == 1:
        if values.min() < 0:
            raise PreconditionError(f"{node.name}: its scale is negative; spell its affine out")
        scale = np.float32(largest / np.iinfo(np.uint8).max)
        return scale, np.asarray(0, np.uint8), np.round(values / np.float64(scale)).astype(np.uint8)
    gain = np.abs(np.asarray(constant_values(node.inputs[1].inputs[0].inputs[1]), np.float64))
    scale = np.float32(float(gain) * float(read.scale))
    return scale, np.asarray(0, np.int32), np.round(values / np.float64(scale)).astype(np.int32)


def _constants(grid: WideGrid, prefix: str) -> list[gs.Constant]:
    return [
        constant(f"{prefix}.wide_scale", np.asarray(grid.scale, np.float32)),
        constant(f"{prefix}.wide_zero_point", np.asarray(grid.zero_point, np.uint16)),
    ]


def _is_layer(node: gs.Node) -> bool:
    """Whether a node multiplies by stored integers: its operands and its result have the recipe's grids."""
    if node.op not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        return False
    return len(node.inputs) > 1 and all(
        bool(value.inputs) and value.inputs[0].op == "DequantizeLinear" for value in node.inputs[:2]
    )


def _moves(node: gs.Node) -> bool:
    """Whether a node only moves numbers."""
    return node.op in MOVES or (node.op == "Resize" and node.attrs.get("mode", "nearest") == "nearest")


def _wanted(value: gs.Tensor) -> WideGrid | None:
    """The 16-bit grid that a value goes to, moved at most on the way, and goes to alone; None where there is none.

    ONNX Runtime joins two grids in a row to the second one. Between two nodes that only move numbers that would leave
    the first with a grid on either side, so the second grid is laid in front of both.
    """
    if len(value.outputs) != 1:
        return None
    (reader,) = value.outputs
    if reader.op == "QuantizeLinear":
        return _grid_of(reader) if _zero_point_type(reader) == np.uint16 else None
    return _wanted(reader.outputs[0]) if _moves(reader) and len(reader.outputs) == 1 else None


def _is_wide(value: gs.Tensor) -> bool:
    """Whether a value was dequantized from 16 bits."""
    return _zero_point_type(value.inputs[0]) == np.uint16


def _zero_point_type(quantizer: gs.Node) -> np.dtype[np.generic]:
    """What the codes of a quantizer or a dequantizer are made of."""
    return element_type(quantizer.inputs[2])


def _grid_of(quantizer: gs.Node) -> WideGrid:
    scale, zero_point = (constant_values(value) for value in quantizer.inputs[1:3])
    return WideGrid(np.float32(scale), int(zero_point))


def _reads_eight_bits(product: gs.Node) -> bool:
    """Whether the second factor of a product was dequantized from 8 bits, or fewer of a weight."""
    (second,) = product.inputs[1:2]
    return bool(second.inputs) and second.inputs[0].op == "DequantizeLinear" and not _is_wide(second)
