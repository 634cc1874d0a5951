"""Choices between truth values, spelled with the operators of logic.

    where(c, a, b)  ==  (c and a) or (not c and b)        a, b: bool

ONNX Runtime's Where has no kernel for truth values, as in a mask that ``masked_fill`` changes.
"""

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CHOICES = frozenset({aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor})


def spell_truth_choices(module: fx.GraphModule) -> None:
    """Rewrite them in place; the graph computes the same."""
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.target in CHOICES and isinstance(value, Tensor) and value.dtype == torch.bool:
            _spell(module.graph, node)
    module.recompile()


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    def emit(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta |= node.meta
        made.meta["val"] = target(*(argument.meta["val"] for argument in args))
        return made

    first, second, third = node.args
    with graph.inserting_before(node):
        if node.target is aten.where.self:
            made = _choice(emit, first, second, third)
        elif isinstance(third, fx.Node):
            made = _choice(emit, second, third, first)
        elif third:
            made = emit(aten.logical_or.default, first, second)
        else:
            made = emit(aten.logical_and.default, first, emit(aten.logical_not.default, second))
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _choice(emit: Any, condition: Any, then: Any, other: Any) -> fx.Node:
    chosen = emit(aten.logical_and.default, condition, then)
    rest = emit(aten.logical_and.default, emit(aten.logical_not.default, condition), other)
    made: fx.Node = emit(aten.logical_or.default, chosen, rest)
    return made
