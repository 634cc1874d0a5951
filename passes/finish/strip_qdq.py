"""Make the float baseline of a quantized graph, against which its speed is measured.

Weights are dequantized and activations flow unquantized; every other node stays as it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.bind.bind_recipe import is_transposed
from tfmq_export.passes.graph import constant, read_instead
from tfmq_export.passes.reading import (
    constant_values,
    double_values,
    float_values,
    int_attribute,
    produced_by,
    static_size,
)
from tfmq_export.passes.scaling.rescale_inputs import scale_input_channels
from tfmq_export.recipe.names import INPUT_COPY, INPUT_OFFSET, INPUT_PAD, OFFSET, OUTPUT_SUM, RAISED, RESCALE

THROUGH = ("Cast", "Clip")
MULTIPLIERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class StripQdq(Pass):
    """Remove all that quantization put in: Q, Clip and DQ, offsets, zero points, rescaled inputs, stacked outputs."""

    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def apply(self, graph: gs.Graph) -> Changes:
        changed = []
        for node in [node for node in graph.nodes if node.name.endswith(INPUT_OFFSET)]:
            _undo_offset(node)
        for node in [node for node in graph.nodes if node.name.endswith(RAISED)]:
            _undo_raise(node)
        for node in [node for node in graph.nodes if node.op == "DequantizeLinear" and not _is_passed(node)]:
            codes = _origin(node.inputs[0])
            if _is_stored(codes):
                twin: gs.Tensor = constant(f"{node.name}.float", _dequantized(node))
            else:
                twin = codes.inputs[0].inputs[0]
            (real,) = node.outputs
            read_instead(real, twin)
            if real in graph.outputs:
                # The output keeps its name: the node that computed the unquantized value writes it.
                twin.inputs[0].outputs = [real]
                node.outputs.clear()
            changed.append(node.name)
        for node in [node for node in graph.nodes if node.name.endswith(OUTPUT_SUM)]:
            _unstack(node)
        for node in [node for node in graph.nodes if node.name.endswith(RESCALE)]:
            _undo_rescale(node)
        return Changes(tuple(changed))

    def ensures(self, graph: gs.Graph) -> None:
        quantizers = [node for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")]
        left = [node.name for node in quantizers if not _is_passed(node)]
        if left:
            raise PostconditionError(f"{left[0]} is still there")


def _origin(value: gs.Tensor) -> gs.Tensor:
    """The stored integers, or the output of the QuantizeLinear, behind clips and casts."""
    while value.inputs and value.inputs[0].op in THROUGH:
        value = value.inputs[0].inputs[0]
    return value


def _is_passed(node: gs.Node) -> bool:
    """Whether a node dequantizes codes that a prologue passes: how a tensor is stored, not how a layer computes."""
    codes = _origin(node.inputs[0])
    return node.op == "DequantizeLinear" and not isinstance(codes, gs.Constant) and not codes.inputs


def _is_stored(value: gs.Tensor) -> bool:
    return isinstance(value, gs.Constant) or (bool(value.inputs) and value.inputs[0].op == "Mul")


def _stored(value: gs.Tensor) -> NDArray[np.int32]:
    """Integers of a weight, shifted where power-of-two scaling shifts them."""
    if isinstance(value, gs.Constant):
        return value.values.astype(np.int32)
    codes, shift = value.inputs[0].inputs
    return _stored(_origin(codes)) * constant_values(shift).astype(np.int32)


def _dequantized(dequantize: gs.Node) -> NDArray[np.float32]:
    """What a DequantizeLinear of stored integers returns."""
    codes, steps = _stored(_origin(dequantize.inputs[0])), float_values(dequantize.inputs[1])
    if steps.ndim:
        axis = int_attribute(dequantize, "axis", 1) % codes.ndim
        steps = steps.reshape([-1 if position == axis else 1 for position in range(codes.ndim)])
    return codes.astype(np.float32) * steps


def _unstack(total: gs.Node) -> None:
    """Undo ``StackOutputCodes``: in floating point one copy of the layer says it all."""
    split = total.inputs[0].inputs[0]
    layer = split.inputs[0].inputs[0]
    copies, start = len(split.outputs), float_values(total.inputs[-1])
    weight, bias = layer.inputs[1:]
    count = static_size(weight, 0) // copies
    layer.inputs[1] = constant(f"{weight.name}.single", float_values(weight)[:count])
    layer.inputs[2] = constant(f"{bias.name}.single", float_values(bias)[:count] + start)
    (result,) = total.outputs
    total.outputs.clear()
    layer.outputs = [result]


def _undo_offset(moved: gs.Node) -> None:
    """Undo ``OffsetInputs``: one copy of the weight, the bias without the offset, padding in the convolution."""
    quantize = moved.outputs[0].outputs[0]
    (real,) = quantize.outputs[0].outputs[0].outputs
    step, _, lowest = _grid(quantize)
    offsets = np.unique(double_values(moved.inputs[1]))[::-1]
    surplus = offsets[0] + step * lowest * (len(offsets) - 1)  # s (K m + z)
    source, pads = moved.inputs[0], None
    if source.inputs and source.inputs[0].name.endswith(INPUT_COPY):
        source = source.inputs[0].inputs[0]
    if source.inputs and source.inputs[0].name.endswith(INPUT_PAD):
        full = [int(size) for size in constant_values(source.inputs[0].inputs[1]).astype(np.int64)]
        rank = len(full) // 2
        pads = [*full[2:rank], *full[rank + 2 :]]
        source = source.inputs[0].inputs[0]
    for layer in list(real.outputs):
        weight = _weight_of(layer)
        if layer.op == "Conv":
            weight = weight[:, : weight.shape[1] // len(offsets)]
            if pads is not None:
                layer.attrs["pads"] = pads
        layer.inputs[0], layer.inputs[1] = source, constant(f"{layer.name}.stripped_weight", weight)
        _raise_bias(layer, surplus * _sums(layer, weight))


def _undo_raise(dequantize: gs.Node) -> None:
    """Undo ``FoldZeroPoints``: the bias without the zero point."""
    step, zero_point, _ = _grid(_origin(dequantize.inputs[0]).inputs[0])
    surplus = step * zero_point
    for layer in dequantize.outputs[0].outputs:
        _raise_bias(layer, surplus * _sums(layer, _weight_of(layer)))


def _grid(quantize: gs.Node) -> tuple[float, int, int]:
    """Scale, zero point and lowest code of a QuantizeLinear, one each."""
    scale, zero_point = (constant_values(value) for value in quantize.inputs[1:3])
    return float(scale.item()), int(zero_point.item()), int(np.iinfo(zero_point.dtype.name).min)


def _sums(layer: gs.Node, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the weights of each output channel."""
    rows = weight.T if is_transposed(layer) else weight.reshape(len(weight), -1)
    sums: NDArray[np.float64] = rows.sum(1, dtype=np.float64)
    return sums


def _weight_of(layer: gs.Node) -> NDArray[np.float32]:
    return _dequantized(produced_by(layer.inputs[1], "DequantizeLinear"))


def _raise_bias(layer: gs.Node, amount: NDArray[np.float64]) -> None:
    name = f"{layer.name}.stripped_bias"
    if layer.op == "MatMul":
        add = layer.outputs[0].outputs[0]
        if add.name.endswith(OFFSET):  # there was no bias
            (result,) = add.outputs
            add.outputs.clear()
            layer.outputs = [result]
            return
        position = next(i for i, value in enumerate(add.inputs) if isinstance(value, gs.Constant))
        add.inputs[position] = constant(name, (float_values(add.inputs[position]) + amount).astype(np.float32))
        return
    bias = layer.inputs[2]
    if isinstance(bias, gs.Constant):
        values = double_values(bias)
    else:
        codes, scale, *_ = produced_by(bias, "DequantizeLinear").inputs
        values = double_values(codes) * double_values(scale)
    layer.inputs[2] = constant(name, (values + amount).astype(np.float32))


def _undo_rescale(node: gs.Node) -> None:
    """Move the factor of an input back into the weights that read it."""
    source, per_channel = node.inputs[0], float_values(node.inputs[1]).reshape(-1)
    (scaled,) = node.outputs
    if scaled.outputs and scaled.outputs[0].op == "Relu":
        relu = scaled.outputs[0]
        relu.inputs[0] = source
        (source,) = relu.outputs
        scaled = source
    for layer in [reader for reader in scaled.outputs if reader.op in MULTIPLIERS]:  # the rest leads nowhere by now
        weight = layer.inputs[1]
        values = float_values(weight)
        if is_transposed(layer):
            scaled_back: NDArray[np.floating] = values * per_channel.reshape(-1, 1)
        else:
            scaled_back = scale_input_channels(values, per_channel, int_attribute(layer, "group", 1))
        layer.inputs[0] = source
        layer.inputs[1] = constant(f"{weight.name}.{layer.name}", scaled_back)
