"""Circular padding, as seamless textures and panoramas have it, spelled as a concatenation.

    pad(x, before, after)  ==  [x[-before:], x, x[:after]]        along each padded axis

ONNX Runtime alone knows ``Pad`` in mode "wrap".
"""

import sys
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def spell_circular_padding(module: fx.GraphModule) -> None:
    """Rewrite it in place; the graph computes the same. Negative widths stay as they are."""
    for node in list(module.graph.nodes):
        if node.target is aten.pad.default and node.args[2:3] == ("circular",) and min(node.args[1]) >= 0:
            _spell(module.graph, node)
    module.recompile()


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    def emit(target: Any, like: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta |= node.meta
        made.meta["val"] = like
        return made

    x: Any = node.args[0]
    widths: Any = node.args[1]
    with graph.inserting_before(node):
        # Widths start with the last axis; corners wrap too, because each axis is padded with what the others added.
        for place in range(len(widths) // 2):
            axis = x.meta["val"].ndim - 1 - place
            before, after = widths[2 * place : 2 * place + 2]
            value = x.meta["val"]
            parts = [x]
            if before:
                parts.insert(0, emit(aten.slice.Tensor, value.narrow(axis, 0, before), x, axis, -before, sys.maxsize))
            if after:
                parts.append(emit(aten.slice.Tensor, value.narrow(axis, 0, after), x, axis, 0, after))
            if len(parts) > 1:
                x = emit(aten.cat.default, torch.cat([part.meta["val"] for part in parts], axis), parts, axis)
    node.replace_all_uses_with(x)
    graph.erase_node(node)
