"""Replace float weights by the integers of the recipe.

    conv      int8 [out, in, *k] -> DequantizeLinear(axis 0)
    Gemm      int8 [out, in]     -> DequantizeLinear(axis 0)         transB = 1
    MatMul    int8 [in, out]     -> DequantizeLinear(axis 1)

Integers of 4 bits and fewer are stored packed, ``INT4 -> Cast(INT8) -> DequantizeLinear``: ONNX Runtime
folds the Cast when it loads the model, so the kernel is the 8-bit one and the file half the size.
The learned integers are stored as they are, never re-rounded from floats.

A bias feeding an integer kernel is int32 on the accumulator's grid, ``input.scale * weight.scale``.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, int4_constant, variable
from tfmq_export.recipe import LayerRecipe, QuantRecipe

PACKED_BITS = 4


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Give every layer of the recipe its integer weight and bias."""

    recipe: QuantRecipe
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            weight = node.inputs[1]
            if not isinstance(weight, gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {weight.name} is not a constant")
            _prove_binding(layer, weight.values.T if _is_transposed(node) else weight.values)

    def apply(self, graph: gs.Graph) -> Changes:
        for layer, node in bound_nodes(graph, self.recipe):
            node.inputs[1] = _dequantized_weight(graph, layer, transposed=_is_transposed(node))
            if len(node.inputs) > 2:
                node.inputs[2] = _dequantized_bias(graph, layer, node.inputs[2])
        return Changes(tuple(layer.path for layer in self.recipe.layers))


def _is_transposed(node: gs.Node) -> bool:
    """Whether the graph stores the weight as [in, out]."""
    return node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0))


def _prove_binding(layer: LayerRecipe, weight: NDArray[np.float32]) -> None:
    """The recipe's integers must be this weight, to one step: ``|W - scale * W_int| <= scale`` unless clipped.

    Raises:
        PostconditionError: they are not.
    """
    codes = layer.weight_codes
    if weight.shape != codes.shape:
        raise PreconditionError(
            f"{layer.path}: the graph's weight is {weight.shape}, the recipe's {codes.shape}; made from another model?"
        )
    scale = layer.weight.scale.reshape(-1, *[1] * (codes.ndim - 1))
    qmin, qmax = layer.weight.spec.qmin, layer.weight.spec.qmax
    clipped = (codes == qmin) & (weight < scale * qmin) | (codes == qmax) & (weight > scale * qmax)
    distance = np.abs(weight - scale * codes)
    if (distance[~clipped] > np.broadcast_to(scale, codes.shape)[~clipped]).any():
        raise PostconditionError(
            f"{layer.path}: the recipe's integers are not a rounding of this weight; made from another model?"
        )


def _dequantized_weight(graph: gs.Graph, layer: LayerRecipe, *, transposed: bool) -> gs.Variable:
    codes = layer.weight_codes.T if transposed else layer.weight_codes
    name = f"{layer.name}.weight_codes"
    stored: gs.Tensor
    if layer.weight.spec.bits <= PACKED_BITS:
        stored = variable(f"{layer.name}.weight_int8", dtype=np.int8, shape=codes.shape)
        packed = int4_constant(name, codes)
        cast = {"to": TensorProto.INT8}
        graph.nodes.append(gs.Node("Cast", f"{layer.name}.weight_unpack", cast, inputs=[packed], outputs=[stored]))
    else:
        stored = constant(name, codes)
    scale = constant(f"{layer.name}.weight_scale", layer.weight.scale)
    zero_point = constant(f"{layer.name}.weight_zero_point", np.zeros(len(layer.weight.scale), np.int8))
    real = variable(f"{layer.name}.weight_dequantized", dtype=np.float32, shape=codes.shape)
    axis = {"axis": 1 if transposed else 0}
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{layer.name}.weight_dq", axis, inputs=[stored, scale, zero_point], outputs=[real])
    )
    return real


def _dequantized_bias(graph: gs.Graph, layer: LayerRecipe, bias: gs.Tensor) -> gs.Variable:
    if not isinstance(bias, gs.Constant):
        raise PreconditionError(f"{layer.path}: its bias {bias.name} is not a constant")
    scale = (layer.input.scale * layer.weight.scale).astype(np.float32)
    codes = np.round(bias.values.astype(np.float64) / scale)
    if np.abs(codes).max(initial=0) > np.iinfo(np.int32).max:
        raise PreconditionError(f"{layer.path}: its bias does not fit 32 bits at the weight's scale")
    stored = constant(f"{layer.name}.bias_codes", codes.astype(np.int32))
    real = variable(f"{layer.name}.bias_dequantized", dtype=np.float32, shape=codes.shape)
    inputs = [
        stored,
        constant(f"{layer.name}.bias_scale", scale),
        constant(f"{layer.name}.bias_zero_point", np.zeros(len(scale), np.int32)),
    ]
    graph.nodes.append(gs.Node("DequantizeLinear", f"{layer.name}.bias_dq", {"axis": 0}, inputs=inputs, outputs=[real]))
    return real
