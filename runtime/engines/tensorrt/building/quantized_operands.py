"""What a layer reads: the walk from an operand back to its DequantizeLinear.

TensorRT moves integers through operations of layout, so a grid reaches its layer through them; behind anything else
the numbers are floating point again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from tfmq_export.runtime.engines.tensorrt.building.qdq_view import FLOATS, QdqView, attribute

LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_LAYOUT = frozenset(
    {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Expand", "Gather"}
)


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a layer.

    Attributes:
        index: 0 or 1.
        dequantized: The DequantizeLinear nodes it comes from; several behind a Concat, none for floating point.
        path: Nodes between them and the layer, the layer's neighbour first; of a Concat's first branch.
        blocker: The node that turns dequantized values into floating point for good.
        is_weight: Whether it is a constant.
    """

    layer: NodeProto
    index: int
    dequantized: tuple[NodeProto, ...]
    path: tuple[NodeProto, ...]
    blocker: NodeProto | None
    is_weight: bool
    quantizes: tuple[NodeProto, ...]

    @property
    def dequantize(self) -> NodeProto | None:
        return self.dequantized[0] if self.dequantized else None

    @property
    def grids(self) -> tuple[NodeProto, ...]:
        """Every QuantizeLinear and DequantizeLinear it passes."""
        return self.dequantized + self.quantizes


def operands_of(view: QdqView, layer: NodeProto) -> Iterator[Operand]:
    """Both operands of a layer; none where its weight or second factor is not quantized."""
    both = [_operand(view, layer, index) for index in (0, 1)]
    if both[1].dequantized or both[1].blocker is not None:
        yield from both


def is_quantized(view: QdqView, layer: NodeProto) -> bool:
    """Whether both operands of a layer come out of a DequantizeLinear."""
    operands = list(operands_of(view, layer))
    return bool(operands) and all(operand.dequantized for operand in operands)


def reads_channels_of(view: QdqView, operand: Operand) -> bool:
    """Whether the axis of a per-channel scale is the one the layer wants, or none can be told.

    For a weight: its output channels. For the first factor of a product: the axis that is summed over.
    """
    grid = operand.dequantize
    assert grid is not None
    if any(node.op_type not in {"Transpose", "Identity", "Cast"} for node in operand.path):
        return operand.is_weight
    rank = len(view.shape(grid.input[0]) or ())
    if rank == 0:
        return operand.is_weight
    axis = attribute(grid, "axis", 1) % rank
    for node in reversed(operand.path):
        if node.op_type == "Transpose":
            order = next((list(each.ints) for each in node.attribute if each.name == "perm"), list(range(rank))[::-1])
            axis = order.index(axis)
    layer = operand.layer
    if layer.op_type == "Conv":
        return axis == 0
    if operand.is_weight:
        transposed = layer.op_type == "Gemm" and attribute(layer, "transB", 0) == 1
        return axis == (rank - 2 if transposed else rank - 1)
    return axis == rank - 1


def _operand(view: QdqView, layer: NodeProto, index: int) -> Operand:
    dequantized, path, blocker = _walk(view, layer.input[index])
    sources = [view.producer(grid.input[0]) for grid in dequantized]
    quantizes = tuple(source for source in sources if source is not None and source.op_type == "QuantizeLinear")
    constant = all(view.is_constant(grid.input[0]) for grid in dequantized) or all(
        view.is_constant(source.input[0]) for source in quantizes
    )
    is_weight = bool(dequantized) and index == 1 and constant
    return Operand(layer, index, dequantized, path, blocker, is_weight, quantizes)


def _walk(
    view: QdqView, value: str, *, past_blocker: bool = True
) -> tuple[tuple[NodeProto, ...], tuple[NodeProto, ...], NodeProto | None]:
    """The DequantizeLinear nodes behind a value, the nodes on the way, and the node that ends it too early.

    Args:
        past_blocker: Whether to look for a grid right behind such a node; once is enough, and more would visit a
            residual network along each of its exponentially many paths.
    """
    path: list[NodeProto] = []
    while True:
        producer = view.producer(value)
        if producer is None:
            return (), tuple(path), None
        if producer.op_type == "DequantizeLinear":
            return (producer,), tuple(path), None
        if producer.op_type == "Concat":
            branches = [_walk(view, branch, past_blocker=past_blocker) for branch in producer.input]
            found = tuple(grid for grids, _, _ in branches for grid in grids)
            blocker = next((blocker for _, _, blocker in branches if blocker is not None), None)
            whole = blocker is None and all(grids for grids, _, _ in branches)
            return (found, (*path, producer), None) if whole else ((), tuple(path), producer if found else blocker)
        if not _keeps_integers(view, producer):
            inputs = [name for name in producer.input if name and not view.is_constant(name)] if past_blocker else []
            # A layer ends its own integers; what reads its result in floating point was not promised any.
            own = producer.op_type in LAYERS
            blocked = not own and any(_walk(view, name, past_blocker=False)[0] for name in inputs)
            return (), tuple(path), producer if blocked else None
        path.append(producer)
        value = producer.input[0]
        if producer.op_type == "Mul" and view.is_constant(value):
            value = producer.input[1]


def _keeps_integers(view: QdqView, node: NodeProto) -> bool:
    """Whether TensorRT runs a node on the integers in front of it."""
    if node.op_type in _LAYOUT:
        return True
    if node.op_type == "MaxPool":
        return True
    if node.op_type == "Cast":
        return view.element_type(node.input[0]) in FLOATS and view.element_type(node.output[0]) in FLOATS
    if node.op_type == "Pad":
        value = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
        return value is not None and not np.any(np.asarray(value))
    if node.op_type == "Mul":
        # By its shape: the numbers of a large constant may not be at hand.
        shapes = [view.shape(name) for name in node.input if view.is_constant(name)]
        return len(shapes) == 1 and shapes[0] is not None and all(size == 1 for size in shapes[0])
    return False
