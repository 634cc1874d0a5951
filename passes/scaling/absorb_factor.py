"""Multiply a value per channel by changing only constants of the nodes that compute it.

    f * (x W + b)  ==  x (f W) + f b            f * norm(x; gamma, beta)  ==  norm(x; f gamma, f beta)

A factor walks upstream from the value it multiplies, through operations that commute with it, until constants
take it: the affine of a normalization, the output channels of a layer, an operand of an elementwise Mul.
Integers stay as they are; a quantized weight takes the factor in its scales. Whatever is not linear per channel
ends the walk (SiLU, GELU, softmax, a quantizer), and so does a second reader.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.graph import constant
from tfmq_export.passes.reading import (
    constant_values,
    element_type,
    float_values,
    int_attribute,
    ints_attribute,
    known_shape,
    rank_of,
    static_size,
)
from tfmq_export.passes.scaling.factor_layout import (
    Factor,
    before_reshape,
    before_split,
    before_transpose,
    without_leading,
)


@dataclass(frozen=True)
class Absorption:
    """What has to change for a value to be multiplied.

    Attributes:
        constants: Inputs of nodes, by position, with what they are multiplied by.
        biases: DequantizeLinear nodes of biases, each with its layer, whose scales theirs follow.
        values: Everything computed that then is multiplied.
    """

    constants: tuple[tuple[gs.Node, int, Factor], ...] = ()
    biases: tuple[tuple[gs.Node, gs.Node], ...] = ()
    values: tuple[gs.Tensor, ...] = ()

    def __add__(self, other: "Absorption") -> "Absorption":
        return Absorption(self.constants + other.constants, self.biases + other.biases, self.values + other.values)

    def apply(self) -> None:
        """Rewrite the constants."""
        for node, position, factor in self.constants:
            _replace(node, position, float_values(node.inputs[position]) * factor)
        for bias, layer in self.biases:
            # Exactly the float32 product of both scales: ONNX Runtime computes in floating point otherwise.
            x, weight = (float_values(operand.inputs[0].inputs[1]) for operand in layer.inputs[:2])
            _replace(bias, 1, x * weight)


def absorb(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """Find what has to change for ``value`` to be ``value * factor``; changes nothing yet.

    Args:
        factor: Positive, of the value's rank.
    Raises:
        PreconditionError: something on the way cannot take the factor; the message is the reason.
    """
    if len(value.outputs) != 1 or any(value is output for output in graph.outputs):
        raise PreconditionError(f"{value.name} has another reader")
    return _absorb_computed(graph, value, factor)


def _absorb_computed(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """``absorb``, once it is known that no reader minds."""
    if not value.inputs:
        raise PreconditionError(f"{value.name} is an input of the graph")
    (node,) = value.inputs
    if node.op not in _RULES:
        reason = "is quantized" if node.op == "DequantizeLinear" else f"comes from {node.op}"
        raise PreconditionError(f"{value.name} {reason}")
    return _RULES[node.op](graph, value, factor) + Absorption(values=(value,))


def _replace(node: gs.Node, position: int, values: Factor) -> None:
    """Give one input of one node other values; who else reads the constant keeps it."""
    before = node.inputs[position]
    name = before.name if len(before.outputs) == 1 else f"{before.name}.{node.name}"
    node.inputs[position] = constant(name, values)


def _take(node: gs.Node, position: int, factor: Factor) -> Absorption:
    """Let a constant take a factor, which is in single precision, as the constant has to be."""
    stored = node.inputs[position]
    if element_type(stored) != np.float32:
        raise PreconditionError(f"{stored.name} holds {element_type(stored)}, not float32")
    return Absorption(constants=((node, position, factor),))


def _operand(graph: gs.Graph, node: gs.Node, position: int, factor: Factor) -> Absorption:
    """One operand of an operation that broadcasts."""
    value = node.inputs[position]
    if isinstance(value, gs.Constant):
        return _take(node, position, without_leading(factor, value.values.ndim))
    shape = known_shape(value)
    own = without_leading(factor, len(shape))
    fits = own.ndim == len(shape)
    if not fits or any(wanted not in (1, size) for size, wanted in zip(shape, own.shape, strict=True)):
        raise PreconditionError(f"{value.name} is broadcast over the channels")
    return absorb(graph, value, own)


def _every_operand(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    (node,) = value.inputs
    return sum((_operand(graph, node, position, factor) for position in range(len(node.inputs))), Absorption())


def _one_operand(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    (node,) = value.inputs
    # A scalar belongs to an idiom such as GELU, which engines recognize by its value.
    gains = [at for at, x in enumerate(node.inputs) if isinstance(x, gs.Constant) and x.values.size > 1]
    reasons = []
    for position in gains + [at for at, x in enumerate(node.inputs) if not isinstance(x, gs.Constant)]:
        try:
            return _operand(graph, node, position, factor)
        except PreconditionError as error:
            reasons.append(str(error))
    raise PreconditionError(" and ".join(reasons))


def _first_operand(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    return _operand(graph, value.inputs[0], 0, factor)


def _channel_norm(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    _along(value, factor, {1})
    return _affine(value.inputs[0], factor.reshape(-1))


def _trailing_norm(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    axis = int_attribute(value.inputs[0], "axis", -1) % factor.ndim
    _along(value, factor, set(range(axis, factor.ndim)))
    return _affine(value.inputs[0], factor.reshape(factor.shape[axis:]))


def _affine(node: gs.Node, factor: Factor) -> Absorption:
    affine = node.inputs[1:3]
    if not all(isinstance(value, gs.Constant) for value in affine):
        raise PreconditionError(f"the affine of {node.name} is computed")
    shapes = [constant_values(value).shape for value in affine]
    if any(np.broadcast_shapes(shape, factor.shape) != shape for shape in shapes):
        raise PreconditionError(f"the affine of {node.name} has no entry per channel")
    return sum((_take(node, position, factor) for position in range(1, 1 + len(affine))), Absorption())


def _layer(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """Output channels of a convolution, or of a product with a stored matrix."""
    (node,) = value.inputs
    _along(value, factor, {1 if node.op == "Conv" else factor.ndim - 1})
    out = factor.reshape(-1)
    weight, *biases = node.inputs[1:]
    found = _weight(node, weight, out)
    for bias in biases:
        if isinstance(bias, gs.Constant):
            found += _take(node, 2, out)
        elif _is_stored(bias) and not isinstance(weight, gs.Constant):
            found += Absorption(biases=((bias.inputs[0], node),))
        else:
            raise PreconditionError(f"the bias of {node.name} is computed")
    return found


def _weight(node: gs.Node, weight: gs.Tensor, out: Factor) -> Absorption:
    """The constant that holds a layer's output channels: the weight, or the scales of its integers."""
    rows = node.op == "Conv" or bool(int_attribute(node, "transB", 0))
    if isinstance(weight, gs.Constant):
        return _take(node, 1, out.reshape(-1, *[1] * (weight.values.ndim - 1)) if rows else out)
    if not _is_stored(weight) or int_attribute(weight.inputs[0], "axis", 1) != (0 if rows else 1):
        raise PreconditionError(f"the weight of {node.name} has no scale per output channel")
    if len(weight.outputs) != 1:
        raise PreconditionError(f"the weight of {node.name} has another reader")
    return _take(weight.inputs[0], 1, out)


def _is_stored(value: gs.Tensor) -> bool:
    """Whether a value is a constant, or integers with a constant scale per channel."""
    if isinstance(value, gs.Constant) or not value.inputs or value.inputs[0].op != "DequantizeLinear":
        return isinstance(value, gs.Constant)
    scale = value.inputs[0].inputs[1]
    return isinstance(scale, gs.Constant) and scale.values.ndim == 1


def _product(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """``(A B) f == A (B f)`` for a factor per column, ``(A f) B`` for one per row."""
    (node,) = value.inputs
    if _is_stored(node.inputs[1]):
        return _layer(graph, value, factor)
    if factor.shape[-2] == 1:
        return _operand(graph, node, 1, factor)
    if factor.shape[-1] == 1:
        return _operand(graph, node, 0, factor)
    raise PreconditionError(f"{node.name} mixes the channels")


def _attention(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """com.microsoft.MultiHeadAttention: heads lie side by side in the result as in v, [B, L, H * D]."""
    (node,) = value.inputs
    given = {position for position, operand in enumerate(node.inputs) if operand.name}
    if 2 not in given or given & {3, 6, 7} or rank_of(node.inputs[2]) != factor.ndim:
        raise PreconditionError(f"{node.name} has packed or past values, or a bias of its own")
    return _operand(graph, node, 2, factor)


def _transpose(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    (node,) = value.inputs
    return absorb(graph, node.inputs[0], before_transpose(factor, ints_attribute(node, "perm")))


def _reshape(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """Also Squeeze, Unsqueeze and Flatten: only the shapes matter."""
    source = value.inputs[0].inputs[0]
    moved = before_reshape(factor, value.shape or (), source.shape or ())
    if moved is None:
        raise PreconditionError(f"the channels of {source.name} {source.shape} are lost in {value.name} {value.shape}")
    return absorb(graph, source, moved)


def _split(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    (node,) = value.inputs
    axis = int_attribute(node, "axis", 0) % factor.ndim
    sizes = [part.shape[axis] if part.shape is not None else None for part in node.outputs]
    static = [size for size in sizes if isinstance(size, int)]
    if len(static) < len(sizes):
        raise PreconditionError(f"the sizes of the parts of {node.name} are not known")
    (part,) = [at for at, output in enumerate(node.outputs) if output is value]
    return absorb(graph, node.inputs[0], before_split(factor, axis, static, part))


def _slice(graph: gs.Graph, value: gs.Tensor, factor: Factor) -> Absorption:
    """The rest may be read as well, as long as nobody reads what this slice reads."""
    (node,) = value.inputs
    source = node.inputs[0]
    axis, start, stop, size = _range_of(node)
    if any(source is output for output in graph.outputs):
        raise PreconditionError(f"{source.name} has another reader")
    for reader in source.outputs:
        if reader is node:
            continue
        own_axis, own_start, own_stop, _ = _range_of(reader)
        if own_axis != axis or max(start, own_start) < min(stop, own_stop):
            raise PreconditionError(f"{source.name} has another reader of what {node.name} takes")
    sizes = [start, stop - start, size - stop]
    return _absorb_computed(graph, source, before_split(factor, axis, sizes, 1))


def _range_of(node: gs.Node) -> tuple[int, int, int, int]:
    """Axis, start and stop of a Slice along one static axis, and the size of that axis."""
    source, parameters = node.inputs[0], [x for x in node.inputs[1:] if isinstance(x, gs.Constant)]
    known = node.op == "Slice" and 3 <= len(parameters) == len(node.inputs) - 1
    if not known or any(x.values.size != 1 for x in parameters) or any(x.values.item() != 1 for x in parameters[3:]):
        raise PreconditionError(f"{source.name} has another reader, or one that is no slice along one axis")
    start, stop, axis = (int(x.values.item()) for x in parameters[:3])
    axis %= rank_of(source)
    size = static_size(source, axis)
    start, stop, _ = slice(start, stop).indices(size)
    return axis, start, max(start, stop), size


def _along(value: gs.Tensor, factor: Factor, axes: set[int]) -> None:
    """Refuse a factor that depends on other axes."""
    if any(size != 1 for axis, size in enumerate(factor.shape) if axis not in axes):
        raise PreconditionError(f"the factor is not per channel of {value.name}")


_RULES: Mapping[str, Callable[[gs.Graph, gs.Tensor, Factor], Absorption]] = {
    "Add": _every_operand,
    "Sub": _every_operand,
    "Mul": _one_operand,
    "Div": _first_operand,
    "Relu": _first_operand,  # max(x, 0) f == max(x f, 0) for f > 0
    "Identity": _first_operand,
    "BatchNormalization": _channel_norm,
    "InstanceNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "LayerNormalization": _trailing_norm,
    "RMSNormalization": _trailing_norm,
    "Conv": _layer,
    "Gemm": _layer,
    "MatMul": _product,
    "MultiHeadAttention": _attention,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Flatten": _reshape,
    "Split": _split,
    "Slice": _slice,
}
