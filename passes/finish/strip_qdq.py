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
from tfmq_export.passes.qdq.fold_zero_points import RAISED
from tfmq_export.passes.qdq.offset_bias import OFFSET
from tfmq_export.passes.scaling.rescale_inputs import RESCALE, scale_input_channels
from tfmq_export.passes.scaling.split_exponents import PARTS

THROUGH = ("Cast", "Clip")
MULTIPLIERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class StripQdq(Pass):
    """Remove all that quantization put in: Q, Clip and DQ, offsets, zero points, rescaled inputs, stacked outputs."""

    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def apply(self, graph: gs.Graph) -> Changes:
        changed = []
        for node in [node for node in graph.nodes if node.name.endswith(".input.offset")]:
            _undo_offset(node)
        for node in [node for node in graph.nodes if node.name.endswith(RAISED)]:
            _undo_raise(node)
        for node in [node for node in graph.nodes if node.op == "DequantizeLinear" and not _is_passed(node)]:
            codes = _origin(node.inputs[0])
            if _is_stored(codes):
                axis = node.attrs.get("axis", 1)
                twin: gs.Tensor = constant(f"{node.name}.float", _dequantize(_stored(codes), node.inputs[1], axis))
            else:
                twin = codes.inputs[0].inputs[0]
            (real,) = node.outputs
            read_instead(real, twin)
            if real in graph.outputs:
                # The output keeps its name: the node that computed the unquantized value writes it.
                twin.inputs[0].outputs = [real]
                node.outputs.clear()
            changed.append(node.name)
        for node in [node for node in graph.nodes if node.name.endswith(".output.sum")]:
            _unstack(node)
        for node in [node for node in graph.nodes if node.name.endswith(PARTS)]:
            _join_parts(graph, node)
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
        return np.asarray(value.values).astype(np.int32)
    codes, shift = value.inputs[0].inputs
    return _stored(_origin(codes)) * np.asarray(shift.values, np.int32)


def _dequantize(codes: NDArray[np.int32], scale: gs.Constant, axis: int) -> NDArray[np.float32]:
    values = codes.astype(np.float32)
    steps = np.asarray(scale.values, np.float32)
    if steps.ndim:
        steps = steps.reshape([-1 if position == axis % values.ndim else 1 for position in range(values.ndim)])
    return values * steps


def _unstack(total: gs.Node) -> None:
    """Undo ``StackOutputCodes``: in floating point one copy of the layer says it all."""
    split = total.inputs[0].inputs[0]
    layer = split.inputs[0].inputs[0]
    copies, start = len(split.outputs), total.inputs[-1].values
    weight, bias = layer.inputs[1], layer.inputs[2]
    count = len(weight.values) // copies
    layer.inputs[1] = constant(f"{weight.name}.single", weight.values[:count])
    layer.inputs[2] = constant(f"{bias.name}.single", bias.values[:count] + start)
    (result,) = total.outputs
    total.outputs.clear()
    layer.outputs = [result]


def _undo_offset(moved: gs.Node) -> None:
    """Undo ``OffsetInputs``: one copy of the weight, the bias without the offset, padding in the convolution."""
    quantize = moved.outputs[0].outputs[0]
    (real,) = quantize.outputs[0].outputs[0].outputs
    step = float(quantize.inputs[1].values)
    lowest = int(np.iinfo(quantize.inputs[2].dtype).min)
    offsets = np.unique(moved.inputs[1].values.astype(np.float64))[::-1]
    surplus = offsets[0] + step * lowest * (len(offsets) - 1)  # s (K m + z)
    source, pads = moved.inputs[0], None
    if source.inputs and source.inputs[0].name.endswith(".input.copy"):
        source = source.inputs[0].inputs[0]
    if source.inputs and source.inputs[0].name.endswith(".input.pad"):
        full = [int(size) for size in source.inputs[0].inputs[1].values]
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
    quantize = _origin(dequantize.inputs[0]).inputs[0]
    surplus = float(quantize.inputs[1].values) * float(quantize.inputs[2].values)
    for layer in dequantize.outputs[0].outputs:
        _raise_bias(layer, surplus * _sums(layer, _weight_of(layer)))


def _sums(layer: gs.Node, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the weights of each output channel."""
    rows = weight.T if is_transposed(layer) else weight.reshape(len(weight), -1)
    return rows.sum(1, dtype=np.float64)


def _weight_of(layer: gs.Node) -> NDArray[np.float32]:
    dequantize = layer.inputs[1].inputs[0]
    return _dequantize(_stored(_origin(dequantize.inputs[0])), dequantize.inputs[1], dequantize.attrs.get("axis", 1))


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
        add.inputs[position] = constant(name, (add.inputs[position].values + amount).astype(np.float32))
        return
    bias = layer.inputs[2]
    if not isinstance(bias, gs.Constant):
        codes, scale, *_ = bias.inputs[0].inputs
        values = codes.values * scale.values.astype(np.float64)
    else:
        values = bias.values
    layer.inputs[2] = constant(name, (values + amount).astype(np.float32))


def _join_parts(graph: gs.Graph, total: gs.Node) -> None:
    """Undo ``SplitExponents``: one layer on all channels."""
    parts = [value.inputs[0] for value in total.inputs]
    gathers = [part.inputs[0].inputs[0] if part.inputs[0].inputs else None for part in parts]
    first, weights = parts[0], [np.asarray(part.inputs[1].values) for part in parts]
    if all(gather is not None and gather.name.endswith(".gather") for gather in gathers):
        axis = 0 if is_transposed(first) else 1
        order = np.argsort(np.concatenate([gather.inputs[1].values for gather in gathers if gather is not None]))
        weight = np.concatenate(weights, axis).take(order, axis)
        source = gathers[0].inputs[0]  # type: ignore[union-attr]  # all() above
    else:  # of a grouped convolution: zeros stand for the other parts' channels
        weight, source = sum(weights[1:], weights[0]), first.inputs[0]
    whole = total.name.removesuffix(PARTS)
    (result,) = total.outputs
    total.outputs.clear()
    inputs = [source, constant(f"{whole}.weight.joined", weight), *first.inputs[2:]]
    for part in parts:
        part.inputs.clear()
    graph.nodes.append(gs.Node(first.op, f"node_{whole}", dict(first.attrs), inputs, [result]))


def _undo_rescale(node: gs.Node) -> None:
    """Move the factor of an input back into the weights that read it."""
    source, factor = node.inputs
    (scaled,) = node.outputs
    if scaled.outputs and scaled.outputs[0].op == "Relu":
        relu = scaled.outputs[0]
        relu.inputs[0] = source
        (source,) = relu.outputs
        scaled = source
    for layer in [reader for reader in scaled.outputs if reader.op in MULTIPLIERS]:  # the rest leads nowhere by now
        weight, per_channel = layer.inputs[1], factor.values.reshape(-1)
        values = np.asarray(weight.values)
        if is_transposed(layer):
            values = values * per_channel.reshape(-1, 1)
        else:
            values = scale_input_channels(values, per_channel, layer.attrs.get("group", 1))
        layer.inputs[0] = source
        layer.inputs[1] = constant(f"{weight.name}.{layer.name}", values)
