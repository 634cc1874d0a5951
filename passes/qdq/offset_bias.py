"""Subtract from a layer's bias the constant by which its quantized input is too large."""

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.qdq.integer_bias import accumulator_step, store_bias
from tfmq_export.passes.reading import constant_values, double_values, produced_by
from tfmq_export.recipe.names import OFFSET
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target


def take_off_bias(graph: gs.Graph, node: gs.Node, layer: LayerRecipe, surplus: int, target: Target) -> None:
    """Lower a layer's bias by ``s surplus sum W``; one without a bias gets one.

    Args:
        node: The layer's, with a quantized weight.
        surplus: Steps of the input's grid.
    """
    integers: NDArray[np.int64] = layer.shifted_codes.reshape(len(layer.weight_codes), -1).sum(1, dtype=np.int64)
    steps = -surplus * integers  # [out], on the accumulator's grid
    step = accumulator_step(layer).astype(np.float64)
    if node.op == "MatMul":
        _add_behind(graph, node, step * steps, layer)
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if target.integer_bias:
        if bias is not None:
            steps += constant_values(produced_by(bias, "DequantizeLinear").inputs[0]).astype(np.int64)
        made: gs.Tensor = store_bias(graph, layer, steps, f"{layer.name}.offset_bias")
    else:
        lowered = step * steps + (0 if bias is None else double_values(bias))
        made = constant(f"{layer.name}.offset_bias", lowered.astype(np.float32))
    node.inputs = [*node.inputs[:2], made]


def _add_behind(graph: gs.Graph, product: gs.Node, amount: NDArray[np.float64], layer: LayerRecipe) -> None:
    """A MatMul's bias is the Add behind it; where there is none, one is put there under the layer's name."""
    (result,) = product.outputs
    for reader in result.outputs:
        for position, value in enumerate(reader.inputs):
            if result.name != layer.name and reader.op == "Add" and isinstance(value, gs.Constant):
                moved = (double_values(value) + amount).astype(np.float32)
                reader.inputs[position] = constant(f"{layer.name}.offset_bias", moved)
                return
    bare = variable(f"{layer.name}.product", np.float32, result.shape)
    product.outputs = [bare]
    rank = 3 if result.shape is None else len(result.shape)
    bias = constant(f"{layer.name}.offset_bias", amount.astype(np.float32).reshape(*[1] * (rank - 1), -1))
    graph.nodes.append(gs.Node("Add", f"{layer.name}{OFFSET}", inputs=[bare, bias], outputs=[result]))
