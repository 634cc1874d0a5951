"""Circular padding, as seamless textures and panoramas have it, spelled as a choice of positions.

    pad(x, before, after)  ==  x[-before % n, ..., 0, 1, ..., n - 1, 0, ...]        along each padded axis of n

ONNX Runtime alone knows ``Pad`` in mode "wrap". As a concatenation of slices it would cost OpenVINO's convolutions
their integers.
"""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def spell_circular_padding(module: fx.GraphModule) -> None:
    """Rewrite it in place; the graph computes the same. Negative widths stay as they are."""
    for node in list(module.graph.nodes):
        if node.target is aten.pad.default and node.args[2:3] == ("circular",) and _is_plain(node):
            _spell(module.graph, node)
    module.recompile()


def _is_plain(node: fx.Node) -> bool:
    """Whether nothing is cut off and every padded size is known."""
    x: Any = node.args[0]
    widths: Any = node.args[1]
    sizes = x.meta["val"].shape[len(x.meta["val"].shape) - len(widths) // 2 :]
    return min(widths) >= 0 and all(isinstance(size, int) for size in sizes)


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    def emit(target: Any, *args: Any) -> fx.Node:
        made: fx.Node = graph.call_function(target, args)
        made.meta |= node.meta
        made.meta["val"] = target(*fx.map_arg(args, lambda value: value.meta["val"]))
        return made

    x: Any = node.args[0]
    widths: Any = node.args[1]
    with graph.inserting_before(node), x.meta["val"].fake_mode:
        # Widths start with the last axis; corners wrap too, because each axis is padded with what the others added.
        for place in range(len(widths) // 2):
            axis = x.meta["val"].ndim - 1 - place
            before, after = widths[2 * place : 2 * place + 2]
            if before or after:
                size = x.meta["val"].shape[axis]
                positions = emit(aten.remainder.Scalar, emit(aten.arange.start, -before, size + after), size)
                x = emit(aten.index_select.default, x, axis, positions)
    node.replace_all_uses_with(x)
    graph.erase_node(node)
