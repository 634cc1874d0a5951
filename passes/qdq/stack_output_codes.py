"""Resolve one layer's output finer than 8 bits, with 8-bit kernels.

    clip(round(y / s), 0, 255 K)  ==  sum_k clip(round((y - 255 k s) / s), 0, 255)        k < K

An engine that fuses convolutions only with an 8-bit result gives 256 levels; for the noise prediction
that is the largest error of the whole network, and for a few layers inside the next one. So the layer
computes its output K times, with biases staggered by 255 steps: where one copy saturates the next one starts,
and their sum has 255 K + 1 levels.
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
from tfmq_export.passes.qdq.activation_codes import CODE_LEVELS, is_dequantized
from tfmq_export.passes.qdq.integer_bias import accumulator_step, store_bias
from tfmq_export.passes.reading import constant_values, double_values, int_attribute, produced_by
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.names import OUTPUT_SUM, STACKED
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe


def stacked(recipe: QuantRecipe) -> list[LayerRecipe]:
    """Layers whose output takes several codes."""
    return [layer for layer in recipe.layers if layer.output is not None and layer.output.spec.codes > 1]


@dataclass(frozen=True)
class StackOutputCodes(RecipePass):
    """Stack the copies on the output channels of one convolution, and add them up behind it.

    Attributes:
        integer_bias: Whether the target takes biases as integers.
    """

    integer_bias: bool = True
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        nodes = {layer.name: node for layer, node in bound_nodes(graph, self.recipe)}
        for layer in stacked(self.recipe):
            node = nodes[layer.name]
            if node.op != "Conv" or int_attribute(node, "group", 1) != 1:
                raise PreconditionError(f"{layer.path}: only a plain convolution can stack output codes")
            if not is_dequantized(node.inputs[1]):
                raise PreconditionError(f"{layer.path}: run QuantizeWeights first")
            if not all(isinstance(value, gs.Constant) for value in node.inputs[1].inputs[0].inputs):
                raise PreconditionError(f"{layer.path}: a packed or shifted weight cannot be stacked")
            if node.outputs[0].name == _raw(layer):
                raise PreconditionError(f"{layer.path}: its output is stacked already")

    def apply(self, graph: gs.Graph) -> Changes:
        nodes = {layer.name: node for layer, node in bound_nodes(graph, self.recipe)}
        layers = stacked(self.recipe)
        for layer in layers:
            assert layer.output is not None
            _stack(graph, layer, layer.output, nodes[layer.name], integer_bias=self.integer_bias)
        return Changes(tuple(layer.path for layer in layers))

    def ensures(self, graph: gs.Graph) -> None:
        nodes = {layer.name: node for layer, node in bound_nodes(graph, self.recipe)}
        for layer in stacked(self.recipe):
            if [reader.op for reader in nodes[layer.name].outputs[0].outputs] != ["QuantizeLinear"]:
                raise PostconditionError(f"{layer.path}: its stacked output is not quantized")


def staggered_bias(bias: NDArray[np.float64], output: QParams) -> NDArray[np.float64]:
    """The bias of each copy, [codes, out]: ``bias - s (255 k - z)``.

    Args:
        bias: [out].
    """
    starts = CODE_LEVELS * np.arange(output.spec.codes) - float(output.zero_point)  # [codes]
    return bias[None, :] - float(output.scale) * starts[:, None]


def _stack(graph: gs.Graph, layer: LayerRecipe, output: QParams, node: gs.Node, *, integer_bias: bool) -> None:
    copies = output.spec.codes
    prefix = f"{layer.name}.output"
    (result,) = node.outputs
    biases = staggered_bias(_bias(layer, node), output)
    real_bias: gs.Tensor = constant(f"{prefix}.bias", biases.reshape(-1).astype(np.float32))
    if integer_bias:
        codes = np.round(biases / accumulator_step(layer).astype(np.float64))
        real_bias = store_bias(graph, layer, codes, f"{prefix}.bias")
    _tile_weight(node.inputs[1].inputs[0], copies)
    node.inputs = [*node.inputs[:2], real_bias]
    raw, stack = variable(_raw(layer), np.float32), variable(f"{prefix}.codes", np.uint8)
    real = variable(f"{prefix}.dequantized", np.float32)
    node.outputs = [raw]
    grid = [constant(f"{prefix}.scale", output.scale), constant(f"{prefix}.zero_point", np.array(0, np.uint8))]
    parts = [variable(f"{prefix}.part{index}", np.float32) for index in range(copies)]
    start = constant(f"{prefix}.start", np.array(-float(output.scale) * float(output.zero_point), np.float32))
    graph.nodes += [
        gs.Node("QuantizeLinear", f"{prefix}.quantize", inputs=[raw, *grid], outputs=[stack]),
        gs.Node("DequantizeLinear", f"{prefix}.dequantize", inputs=[stack, *grid], outputs=[real]),
        gs.Node("Split", f"{prefix}.split", {"axis": 1, "num_outputs": copies}, [real], parts),
        gs.Node("Sum", f"{layer.name}{OUTPUT_SUM}", inputs=[*parts, start], outputs=[result]),
    ]


def _raw(layer: LayerRecipe) -> str:
    """What the stacked copies compute."""
    return f"{layer.name}.output.raw"


def _bias(layer: LayerRecipe, node: gs.Node) -> NDArray[np.float64]:
    """The layer's bias as it is stored, in floating point or as integers, [out]."""
    if len(node.inputs) < 3:
        return np.zeros(len(layer.weight_codes))
    if isinstance(node.inputs[2], gs.Constant):
        return double_values(node.inputs[2])
    codes = double_values(produced_by(node.inputs[2], "DequantizeLinear").inputs[0])
    return codes * accumulator_step(layer).astype(np.float64)


def _tile_weight(dequantize: gs.Node, copies: int) -> None:
    """Repeat a stored weight, its scales and its zero points along the output channels."""
    for position, value in enumerate(dequantize.inputs):
        values = constant_values(value)
        times = (copies, *[1] * (values.ndim - 1))
        dequantize.inputs[position] = constant(f"{value.name}{STACKED}", np.tile(values, times))
    dequantize.outputs[0].shape = None
