"""Move the zero point of a linear layer's input into its bias.

    s (q - z) W + b  ==  s q W + (b - s z sum W)

QuantizeLinear keeps its zero point, so the integers are the same; only DequantizeLinear loses it. OpenVINO multiplies
integers without a zero point faster. A convolution keeps its zero point: its border is padded with a real zero, which
is the integer ``z``, and padding the integers costs as much as the zero point does.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import variable
from tfmq_export.passes.qdq.activation_codes import reads_dequantized
from tfmq_export.passes.qdq.offset_bias import take_off_bias
from tfmq_export.recipe.names import RAISED
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target


@dataclass(frozen=True)
class FoldZeroPoints(RecipePass):
    """Dequantize the inputs of linear layers without a zero point; runs behind ``QuantizeWeights``."""

    target: Target
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in self._mine(graph):
            if isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight is not quantized; run QuantizeWeights first")

    def apply(self, graph: gs.Graph) -> Changes:
        raised: dict[str, gs.Variable] = {}
        layers = self._mine(graph)
        for layer, node in layers:
            x = node.inputs[0]
            if x.name not in raised:
                raised[x.name] = _without_zero_point(graph, x)
            node.inputs[0] = raised[x.name]
            take_off_bias(graph, node, layer, int(layer.input.zero_point), self.target)
        return Changes(tuple(layer.path for layer, _ in layers))

    def ensures(self, graph: gs.Graph) -> None:
        left = [layer.path for layer, _ in self._mine(graph)]
        if left:
            raise PostconditionError(f"{left[0]}: its input still has a zero point")

    def _mine(self, graph: gs.Graph) -> list[tuple[LayerRecipe, gs.Node]]:
        return [(layer, node) for layer, node in bound_nodes(graph, self.recipe) if _has_zero_point(layer, node)]


def _has_zero_point(layer: LayerRecipe, node: gs.Node) -> bool:
    if layer.kind != "linear" or not reads_dequantized(node):
        return False
    zero_point = node.inputs[0].inputs[0].inputs[2:]
    return bool(zero_point) and isinstance(zero_point[0], gs.Constant) and bool(np.any(zero_point[0].values))


def _without_zero_point(graph: gs.Graph, x: gs.Tensor) -> gs.Variable:
    (dequantize,) = x.inputs
    codes, scale, _ = dequantize.inputs
    raised = variable(f"{x.name}{RAISED}", x.dtype, x.shape)
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{dequantize.name}{RAISED}", inputs=[codes, scale], outputs=[raised])
    )
    return raised
