"""The captured graph in the form that the ONNX exporter takes at its word.

``squeeze(dim)`` of an axis that is longer than 1 changes nothing in PyTorch, and one number stands for all axes of a
convolution or a pooling. The exporter writes both down as they are, and the graph does not load. What is filled with
one number in the type of another value has nothing to do with that value: a weight made so is still a weight.
Attention without an axis of heads has one head. And ONNX knows places in a table as 64-bit numbers alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Number of axes, and the arguments that hold one number for each.
SPATIAL: Mapping[object, tuple[int, tuple[int, ...]]] = {
    aten.conv2d.default: (2, (3, 4, 5)),
    aten.conv2d.padding: (2, (3, 5)),
    aten.conv3d.default: (3, (3, 4, 5)),
    aten.conv3d.padding: (3, (3, 5)),
    aten.conv_transpose2d.input: (2, (3, 4, 5, 7)),
    aten.conv_transpose3d.input: (3, (3, 4, 5, 7)),
    aten.avg_pool2d.default: (2, (1, 2, 3)),
    aten.avg_pool3d.default: (3, (1, 2, 3)),
    aten.max_pool2d.default: (2, (1, 2, 3, 4)),
    aten.max_pool3d.default: (3, (1, 2, 3, 4)),
}

FILLED: Mapping[object, object] = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
}
"""Constructors in the type of a value, and those that name the type."""


def as_the_exporter_takes_it(module: fx.GraphModule) -> None:
    """Rewrite what the exporter would get wrong, in place; the graph computes the same."""
    for node in list(module.graph.nodes):
        if node.target in (aten.squeeze.dim, aten.squeeze.dims):
            _drop_or_narrow(module.graph, node)
        elif node.target in FILLED and all(isinstance(size, int) for size in node.args[1]):
            value = node.meta["val"]
            node.target, node.args = FILLED[node.target], node.args[1:]
            node.kwargs = {"dtype": value.dtype, "device": value.device}
        elif node.target is aten.scaled_dot_product_attention.default and node.args[0].meta["val"].ndim == 3:
            _give_one_head(module.graph, node)
        elif node.target is aten.index.Tensor:
            _widen_places(module.graph, node)
        elif node.target in SPATIAL:
            count, places = SPATIAL[node.target]
            node.args = tuple(
                _for_each_axis(value, count) if place in places else value for place, value in enumerate(node.args)
            )
    module.recompile()


def _drop_or_narrow(graph: fx.Graph, node: fx.Node) -> None:
    """Squeeze only what has one element."""
    source: Any = node.args[0]
    asked: Any = node.args[1]
    shape = source.meta["val"].shape
    axes = [asked] if isinstance(asked, int) else list(asked)
    single = [axis for axis in axes if len(shape) and isinstance(shape[axis], int) and shape[axis] == 1]
    if not single:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    elif single != axes:
        node.args = (source, single)


def _give_one_head(graph: fx.Graph, node: fx.Node) -> None:
    """``attention(q, k, v)  ==  attention(q[:, None], k[:, None], v[:, None])[:, 0]``; a mask for each row alike."""

    def emit(target: Any, *args: Any, **options: Any) -> fx.Node:
        made: fx.Node = graph.call_function(target, args, options)
        made.meta |= node.meta
        made.meta["val"] = target(*fx.map_arg(args, _value), **fx.map_arg(options, _value))
        return made

    def widened(value: Any) -> Any:
        return (
            emit(aten.unsqueeze.default, value, 1) if isinstance(value, fx.Node) and _value(value).ndim == 3 else value
        )

    with graph.inserting_before(node), _value(node.args[0]).fake_mode:
        args = [widened(value) for value in node.args]
        options = {name: widened(value) for name, value in node.kwargs.items()}
        found = emit(aten.squeeze.dim, emit(node.target, *args, **options), 1)
    node.replace_all_uses_with(found)
    graph.erase_node(node)


def _widen_places(graph: fx.Graph, node: fx.Node) -> None:
    """Index with 64-bit numbers."""
    places: list[Any] = []
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs["indices"]
    for place in given:
        if isinstance(place, fx.Node) and _value(place).dtype == torch.int32:
            with graph.inserting_before(node), _value(place).fake_mode:
                wide: fx.Node = graph.call_function(aten._to_copy.default, (place,), {"dtype": torch.int64})
                wide.meta |= node.meta
                wide.meta["val"] = aten._to_copy.default(_value(place), dtype=torch.int64)
            places.append(wide)
        else:
            places.append(place)
    node.args, node.kwargs = (node.args[0], places), {}


def _value(node: Any) -> Any:
    return node.meta["val"]


def _for_each_axis(value: Any, count: int) -> Any:
    return list(value) * count if isinstance(value, (list, tuple)) and len(value) == 1 else value
