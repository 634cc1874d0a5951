"""Lower an activation grid per timestep (finite set calibration) to constant quantizers.

    x^_t  ==  s_t (q - z_t)                             q = clip(round((f_t x + c_t) / s_0), m, m + 2^b - 1) - m
    conv(x^_t, W) + b  ==  g_t conv(s_0 (q + m), W) + r_t

with ``f_t = s_0 / s_t``, ``c_t = s_0 (z_t + m)``, ``g_t = s_t / s_0``, ``r_t = b - s_t (z_t + m) sum W`` and m the
lowest code. The four are rows of tables like every other temporal feature; scale and zero point of the quantizer stay
constants, because no engine keeps a layer in integers whose scale is computed (TFMQ-DM, section 4.2).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.qdq.activation_codes import clip, code_type, grid_constants, reads_dequantized
from tfmq_export.passes.qdq.offset_inputs import check_pads, pad, take_pads
from tfmq_export.passes.reading import double_values, known_shape
from tfmq_export.recipe.names import ROWS, lookup_name
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe, TimestepGrids
from tfmq_export.target import Target


@dataclass(frozen=True)
class LowerTimestepGrids(RecipePass):
    """Quantize the inputs that have one grid per timestep; runs in front of ``QuantizeWeights``."""

    target: Target
    sample: str
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        mine = _mine(graph, self.recipe)
        values = graph.tensors()
        if mine and ROWS not in values:
            raise PreconditionError(f"{mine[0][0].path}: no row of the timestep in the graph; run TabulateTib first")
        for layer, node, _ in mine:
            source = node.inputs[0]
            if reads_dequantized(node):
                raise PreconditionError(f"{layer.path}: its input is quantized already")
            check_pads(layer, node)
            if layer.input.spec.codes > 1:
                raise PreconditionError(f"{layer.path}: a grid per timestep is one code, not {layer.input.spec.codes}")
            if not _one_row_per_sample(source, values[self.sample]):
                rows = known_shape(source)[0]
                raise PreconditionError(
                    f"{layer.path}: reads {rows} rows, not one per sample; a grid per timestep has no meaning there; "
                    'set fsc = "tib" in [method]'
                )
            if len(node.inputs) > 2 and not isinstance(node.inputs[2], gs.Constant):
                raise PreconditionError(f"{layer.path}: its bias {node.inputs[2].name} is not a constant")

    def apply(self, graph: gs.Graph) -> Changes:
        ready: dict[tuple[object, ...], gs.Variable] = {}
        layers, values = _mine(graph, self.recipe), graph.tensors()
        for layer, node, grids in layers:
            rows = values[ROWS]
            source, pads = node.inputs[0], take_pads(node)
            lowering = _Lowering(layer, grids, self.target, _rank(layer, node, source))
            key = (source.name, pads, layer.input.spec, grids.scale.tobytes(), grids.zero_point.tobytes())
            if key not in ready:
                value = pad(graph, source, pads, layer.name) if pads else source
                ready[key] = _quantize(graph, value, lowering, rows)
            node.inputs[0] = ready[key]
            _restore(graph, node, lowering, rows)
        return Changes(tuple(layer.path for layer, _, _ in layers))

    def ensures(self, graph: gs.Graph) -> None:
        for layer, node, _ in _mine(graph, self.recipe):
            if not reads_dequantized(node):
                raise PostconditionError(f"{layer.path}: its input is not quantized")


def _mine(graph: gs.Graph, recipe: QuantRecipe) -> list[tuple[LayerRecipe, gs.Node, TimestepGrids]]:
    return [
        (layer, node, layer.input_by_timestep)
        for layer, node in bound_nodes(graph, recipe)
        if layer.input_by_timestep is not None
    ]


def _one_row_per_sample(value: gs.Tensor, sample: gs.Tensor) -> bool:
    """False where the graph says that a value folds tokens or frames into its batch axis."""
    if value.shape is None or sample.shape is None:
        return True
    unnamed = str(value.shape[0]).startswith("unk__")  # as shape inference calls what it could not follow
    return unnamed or value.shape[0] == sample.shape[0]


def _rank(layer: LayerRecipe, node: gs.Node, value: gs.Tensor) -> int:
    if layer.kind == "conv":
        return layer.weight_codes.ndim
    if node.op == "Gemm":
        return 2
    return 3 if value.shape is None else len(value.shape)


@dataclass(frozen=True)
class _Lowering:
    """The four tables of one layer, each [T, ...] and ready to broadcast against an activation.

    Attributes:
        rank: Of the activation.
    """

    layer: LayerRecipe
    grids: TimestepGrids
    target: Target
    rank: int

    @property
    def step(self) -> np.float64:
        """``s_0``: that of the widest range, so that no gain enlarges."""
        return np.float64(self.grids.scale.max())

    @property
    def lowest(self) -> int:
        return int(np.iinfo(code_type(self.target)).min)

    @property
    def factors(self) -> NDArray[np.float32]:
        return self._column(self.step / self.grids.scale.astype(np.float64))

    @property
    def offsets(self) -> NDArray[np.float32]:
        return self._column(self.step * (self.grids.zero_point + np.int64(self.lowest)))

    @property
    def gains(self) -> NDArray[np.float32]:
        return self._column(self.grids.scale.astype(np.float64) / self.step)

    def biases(self, bias: NDArray[np.float64]) -> NDArray[np.float32]:
        """``r_t``, [T, ...] with the output channels where the layer has them."""
        codes = self.layer.shifted_codes
        counts: NDArray[np.int64] = codes.reshape(len(codes), -1).sum(1, dtype=np.int64)
        sums = self.layer.weight_step.astype(np.float64) * counts  # [out]
        constants = self.grids.scale.astype(np.float64) * (self.grids.zero_point + np.int64(self.lowest))  # [T]
        rows = (bias[None, :] - constants[:, None] * sums[None, :]).astype(np.float32)  # [T, out]
        middle = [1] * (self.rank - 2)
        return rows.reshape((len(rows), -1, *middle) if self.layer.kind == "conv" else (len(rows), *middle, -1))

    def _column(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        return values.astype(np.float32).reshape(-1, *[1] * (self.rank - 1))


def _quantize(graph: gs.Graph, source: gs.Tensor, lowering: _Lowering, rows: gs.Tensor) -> gs.Variable:
    prefix, spec = f"{lowering.layer.name}.input", lowering.layer.input.spec
    value = _with_row(graph, "Mul", source, lowering.factors, rows, f"{prefix}.to_common_scale")
    value = _with_row(graph, "Add", value, lowering.offsets, rows, f"{prefix}.to_zero_point")
    highest = lowering.lowest + spec.qmax
    if highest < np.iinfo(code_type(lowering.target)).max:
        limits = np.array([lowering.lowest, highest], np.float32) * np.float32(lowering.step)
        value = clip(graph, value, limits, f"{prefix}.limits")
    stored = variable(f"{prefix}.codes", code_type(lowering.target))
    real = variable(f"{prefix}.dequantized", np.float32)
    constants = grid_constants(np.asarray(lowering.step), 0, code_type(lowering.target), prefix)
    graph.nodes += [
        gs.Node("QuantizeLinear", f"{prefix}.quantize", inputs=[value, *constants], outputs=[stored]),
        gs.Node("DequantizeLinear", f"{prefix}.dequantize", inputs=[stored, *constants], outputs=[real]),
    ]
    return real


def _restore(graph: gs.Graph, node: gs.Node, lowering: _Lowering, rows: gs.Tensor) -> None:
    """Behind the layer: its own scale, and its bias with the constant part of the input taken off."""
    prefix = f"{lowering.layer.name}.result"
    (result,) = node.outputs
    bias = np.zeros(len(lowering.layer.weight_codes))
    if len(node.inputs) > 2:
        bias = double_values(node.inputs[2])
        node.inputs = node.inputs[:2]
    add = next((reader for reader in result.outputs if reader.op == "Add"), None)
    if result.name != lowering.layer.name and add is not None:  # the bias of a MatMul
        (stored,) = (value for value in add.inputs if value is not result)
        bias = double_values(stored).reshape(-1)
        (result,) = add.outputs
        add.outputs.clear()
    raw = variable(f"{prefix}.raw", np.float32)
    node.outputs = [raw]
    scaled = _with_row(graph, "Mul", raw, lowering.gains, rows, f"{prefix}.to_own_scale")
    _with_row(graph, "Add", scaled, lowering.biases(bias), rows, result)


def _with_row(
    graph: gs.Graph,
    op: str,
    value: gs.Tensor,
    table: NDArray[np.float32],
    rows: gs.Tensor,
    result: gs.Variable | str,
) -> gs.Variable:
    """``value op table[row(t)]``.

    Args:
        result: The value to compute, or a name for a new one.
    """
    name = result if isinstance(result, str) else f"{result.name}.{op.lower()}"
    row = variable(f"{name}.row", np.float32)
    made = variable(f"{name}.value", np.float32) if isinstance(result, str) else result
    graph.nodes += [
        gs.Node("Gather", lookup_name(name), {"axis": 0}, [constant(f"{name}.table", table), rows], [row]),
        gs.Node(op, name, inputs=[value, row], outputs=[made]),
    ]
    return made
