"""Put the recipe's activation grids into the graph.

    x -> QuantizeLinear -> [Clip] -> DequantizeLinear -> layer [-> QuantizeLinear -> DequantizeLinear]

Activations are uint8 with any zero point. QuantizeLinear saturates at 8 bits only, so narrower grids
need the Clip on their codes. Layers that read one value through one grid share its nodes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, variable
from tfmq_export.recipe import LayerRecipe, QuantRecipe
from tfmq_export.spec import QParams


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Quantize the input of every layer, and the outputs the target wants quantized."""

    recipe: QuantRecipe
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if _reads_dequantized(node):
                raise PreconditionError(f"{layer.path}: its input is quantized already")

    def apply(self, graph: gs.Graph) -> Changes:
        inserted: dict[str, list[tuple[LayerRecipe, gs.Tensor]]] = {}
        bound = bound_nodes(graph, self.recipe)
        for layer, node in bound:
            source = node.inputs[0]
            ready = inserted.setdefault(source.name, [])
            shared = next((value for other, value in ready if other.input.same_as(layer.input)), None)
            if shared is None:
                prefix = source.name if not ready else f"{source.name}.{len(ready)}"
                shared = _quantize_dequantize(graph, source, layer.input, prefix)
                ready.append((layer, shared))
            node.inputs[0] = shared
        for layer, node in bound:
            if layer.output is not None and layer.output.spec.codes == 1:  # StackOutputCodes does the others
                _quantize_output(graph, node, layer.output, f"{layer.name}.output")
        return Changes(tuple(layer.path for layer in self.recipe.layers))

    def ensures(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if not _reads_dequantized(node):
                raise PostconditionError(f"{layer.path}: its input is not quantized")


def grid_constants(grid: QParams, prefix: str) -> tuple[gs.Constant, gs.Constant]:
    """Scale and zero point of an unsigned per-tensor grid. Rank 0: a [1]-shaped scale loses int8 on TensorRT."""
    scale = constant(f"{prefix}.scale", np.asarray(grid.scale, np.float32))
    return scale, constant(f"{prefix}.zero_point", np.asarray(grid.zero_point, np.uint8))


def _reads_dequantized(node: gs.Node) -> bool:
    return bool(node.inputs[0].inputs) and node.inputs[0].inputs[0].op == "DequantizeLinear"


def _quantize_dequantize(graph: gs.Graph, source: gs.Tensor, grid: QParams, prefix: str) -> gs.Variable:
    scale, zero_point = grid_constants(grid, prefix)
    codes = variable(f"{prefix}.codes", dtype=np.uint8, shape=source.shape)
    graph.nodes.append(
        gs.Node("QuantizeLinear", f"{prefix}.quantize", inputs=[source, scale, zero_point], outputs=[codes])
    )
    if grid.spec.qmax < np.iinfo(np.uint8).max:
        limits = [
            constant(f"{prefix}.{name}", np.array(limit, np.uint8))
            for name, limit in (("qmin", grid.spec.qmin), ("qmax", grid.spec.qmax))
        ]
        clipped = variable(f"{prefix}.clipped", dtype=np.uint8, shape=source.shape)
        graph.nodes.append(gs.Node("Clip", f"{prefix}.clip", inputs=[codes, *limits], outputs=[clipped]))
        codes = clipped
    real = variable(f"{prefix}.dequantized", dtype=np.float32, shape=source.shape)
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{prefix}.dequantize", inputs=[codes, scale, zero_point], outputs=[real])
    )
    return real


def _quantize_output(graph: gs.Graph, node: gs.Node, grid: QParams, prefix: str) -> None:
    """Everything that read the layer's result reads its quantized twin, under the old name."""
    result = node.outputs[0]
    raw = variable(f"{prefix}.raw", dtype=np.float32, shape=result.shape)
    node.outputs[0] = raw
    real = _quantize_dequantize(graph, raw, grid, prefix)
    real.inputs[0].outputs = [result]
