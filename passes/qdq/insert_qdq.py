"""Put the recipe's activation grids into the graph.

    x -> QuantizeLinear -> [Clip] -> DequantizeLinear -> layer [-> QuantizeLinear -> DequantizeLinear]

What a target's 8-bit codes cannot hold is left to ``OffsetInputs`` and ``StackOutputCodes``. Layers that read one
value through one grid share its nodes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import variable
from tfmq_export.passes.qdq.activation_codes import fits, quantize_dequantize, reads_dequantized
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target


@dataclass(frozen=True)
class InsertQdq(RecipePass):
    """Quantize the input of every layer, and the outputs the target wants quantized."""

    target: Target
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if reads_dequantized(node):
                raise PreconditionError(f"{layer.path}: its input is quantized already")

    def apply(self, graph: gs.Graph) -> Changes:
        inserted: dict[str, list[tuple[LayerRecipe, gs.Tensor]]] = {}
        bound = bound_nodes(graph, self.recipe)
        for layer, node in self._mine(bound):
            source = node.inputs[0]
            ready = inserted.setdefault(source.name, [])
            shared = next((value for other, value in ready if other.input.same_as(layer.input)), None)
            if shared is None:
                prefix = source.name if not ready else f"{source.name}.{len(ready)}"
                shared = quantize_dequantize(graph, source, layer.input, self.target, prefix)
                ready.append((layer, shared))
            node.inputs[0] = shared
        for layer, node in bound:
            if layer.output is not None and layer.output.spec.codes == 1:  # StackOutputCodes does the others
                _quantize_output(graph, node, layer.output, self.target, f"{layer.name}.output")
        return Changes(tuple(layer.path for layer, _ in self._mine(bound)))

    def ensures(self, graph: gs.Graph) -> None:
        for layer, node in self._mine(bound_nodes(graph, self.recipe)):
            if not reads_dequantized(node):
                raise PostconditionError(f"{layer.path}: its input is not quantized")

    def _mine(self, bound: list[tuple[LayerRecipe, gs.Node]]) -> list[tuple[LayerRecipe, gs.Node]]:
        return [(layer, node) for layer, node in bound if fits(layer, self.target)]


def _quantize_output(graph: gs.Graph, node: gs.Node, grid: QParams, target: Target, prefix: str) -> None:
    """Everything that read the layer's result reads its quantized twin, under the old name."""
    result = node.outputs[0]
    raw = variable(f"{prefix}.raw", dtype=np.float32, shape=result.shape)
    node.outputs[0] = raw
    real = quantize_dequantize(graph, raw, grid, target, prefix)
    real.inputs[0].outputs = [result]
