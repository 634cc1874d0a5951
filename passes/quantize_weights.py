"""Replace float weights by the integers of the recipe.

    conv      int8 [out, in, *k] -> DequantizeLinear(axis 0)
    Gemm      int8 [out, in]     -> DequantizeLinear(axis 0)         transB = 1
    MatMul    int8 [in, out]     -> DequantizeLinear(axis 1)

Integers of 4 bits and fewer are stored packed, ``INT4 -> Cast(INT8) -> DequantizeLinear``: ONNX Runtime
folds the Cast when it loads the model, so the kernel is the 8-bit one and the file half the size.
The learned integers are stored as they are, never re-rounded from floats.

Power-of-two scaling (PTS) shifts the integers of input channel k by ``d_k``. The shifts are folded into the
8-bit container, ``INT4 -> Cast(INT32) -> Mul(2^(d_k - min d)) -> Cast(INT8)``, and the scale takes ``2^(min d)``: the
engine folds that too, so PTS on 4-bit weights costs nothing at run time.

A bias feeding an integer kernel is int32 on the accumulator's grid, ``input.scale * weight.scale``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

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
    """The recipe's integers must be this weight, to one step: ``|tau W - scale * W_int| <= scale`` unless clipped.

    Raises:
        PostconditionError: they are not.
    """
    codes = layer.weight_codes
    if layer.les_scale is not None and weight.shape == codes.shape:
        weight = scale_input_channels(weight, layer.les_scale, layer.groups)
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


def scale_input_channels(weight: NDArray[Any], factor: NDArray[Any], groups: int) -> NDArray[Any]:
    """Every input channel of a weight times its factor.

    Args:
        weight: [out, in / groups, ...].
        factor: [in].
    """
    rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return (rows * factor.reshape(groups, 1, -1, 1)).reshape(weight.shape)


def weight_steps(layer: LayerRecipe) -> NDArray[np.float32]:
    """Real value of one step of the stored, shifted integers, per output channel."""
    if layer.pts_exponent is None:
        return layer.weight.scale
    return layer.weight.scale * np.float32(2.0 ** int(layer.pts_exponent.min()))


def _dequantized_weight(graph: gs.Graph, layer: LayerRecipe, *, transposed: bool) -> gs.Variable:
    codes = layer.weight_codes.T if transposed else layer.weight_codes
    stored = _stored_codes(graph, layer, codes, transposed=transposed)
    scale = constant(f"{layer.name}.weight_scale", weight_steps(layer))
    zero_point = constant(f"{layer.name}.weight_zero_point", np.zeros(len(layer.weight.scale), np.int8))
    real = variable(f"{layer.name}.weight_dequantized", dtype=np.float32, shape=codes.shape)
    axis = {"axis": 1 if transposed else 0}
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{layer.name}.weight_dq", axis, inputs=[stored, scale, zero_point], outputs=[real])
    )
    return real


def _stored_codes(graph: gs.Graph, layer: LayerRecipe, codes: NDArray[np.int8], *, transposed: bool) -> gs.Tensor:
    """The integers as int8: packed where they are narrow, shifted where PTS says so."""
    name = f"{layer.name}.weight_codes"
    is_packed = layer.weight.spec.bits <= PACKED_BITS
    stored: gs.Tensor = int4_constant(name, codes) if is_packed else constant(name, codes)
    if layer.pts_exponent is not None:
        shift = _shift(layer, transposed=transposed)
        shifted, container = codes.astype(np.int32) * shift, np.iinfo(np.int8)
        if shifted.max() > container.max or shifted.min() < container.min:
            raise PreconditionError(
                f"{layer.path}: its {layer.weight.spec.bits}-bit weight shifted by PTS does not fit 8 bits; use 4-bit "
                "weights or --pts off"
            )
        wide = _cast(graph, stored, f"{layer.name}.weight_int32", TensorProto.INT32, codes.shape)
        stored = variable(f"{layer.name}.weight_shifted", dtype=np.int32, shape=codes.shape)
        factors = constant(f"{layer.name}.weight_shift", shift)
        graph.nodes.append(gs.Node("Mul", f"{layer.name}.weight_shift_by", inputs=[wide, factors], outputs=[stored]))
    if is_packed or layer.pts_exponent is not None:
        return _cast(graph, stored, f"{layer.name}.weight_int8", TensorProto.INT8, codes.shape)
    return stored


def _shift(layer: LayerRecipe, *, transposed: bool) -> NDArray[np.int32]:
    """``2^(d_k - min d)`` for each weight's input channel, broadcastable against the stored codes."""
    assert layer.pts_exponent is not None
    shift = np.exp2(layer.pts_exponent.astype(np.int32) - int(layer.pts_exponent.min())).astype(np.int32)  # [in]
    if transposed:
        return shift.reshape(-1, 1)
    groups, rank = layer.groups, layer.weight_codes.ndim
    per_output = np.repeat(shift.reshape(groups, -1), len(layer.weight_codes) // groups, axis=0)
    rows = per_output[:1] if groups == 1 else per_output
    return rows.reshape(*rows.shape, *[1] * (rank - 2))


def _cast(graph: gs.Graph, value: gs.Tensor, name: str, to: int, shape: tuple[int, ...]) -> gs.Variable:
    result = variable(name, dtype=helper.tensor_dtype_to_np_dtype(to), shape=shape)
    graph.nodes.append(gs.Node("Cast", f"{name}.cast", {"to": to}, inputs=[value], outputs=[result]))
    return result


def _dequantized_bias(graph: gs.Graph, layer: LayerRecipe, bias: gs.Tensor) -> gs.Variable:
    if not isinstance(bias, gs.Constant):
        raise PreconditionError(f"{layer.path}: its bias {bias.name} is not a constant")
    scale = (layer.input.scale * weight_steps(layer)).astype(np.float32)
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
