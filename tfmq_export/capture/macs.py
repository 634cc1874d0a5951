"""Multiply-accumulates of the operations of a captured graph, read off their shapes; for one sample.

A value may hold several rows of its first axis for each sample (frames, windows, heads): all of them count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.rows import elements_for_one, size_for_one

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding}
    | {aten.conv3d.default, aten.conv3d.padding, aten.convolution.default}
)
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
EINSUM = frozenset({aten.einsum.default})
SDPA = aten.scaled_dot_product_attention.default
CONVOLUTION_IS_TRANSPOSED = 6  # position of the flag among aten.convolution's arguments


def macs_of(node: fx.Node) -> int:
    """What a node multiplies; 0 where it is no product."""
    if is_transposed(node):
        return elements_for_one(_argument(node, 0)) * _per_position(node)
    counter = _COUNTERS.get(node.target)
    return 0 if counter is None else counter(node)


def count_macs(graph: fx.Graph, counted: Callable[[fx.Node], bool]) -> int:
    """Of all nodes that ``counted`` says."""
    return sum(macs_of(node) for node in graph.nodes if counted(node))


def is_transposed(node: fx.Node) -> bool:
    """Whether a node is a transposed convolution."""
    flagged = node.target is aten.convolution.default and bool(node.args[CONVOLUTION_IS_TRANSPOSED])
    return node.target in TRANSPOSED or flagged


def attention_macs(node: fx.Node) -> tuple[int, int]:
    """Of both products of ``scaled_dot_product_attention``: the scores, and the sum of the values."""
    query, key, value = (_shape(_argument(node, place)) for place in range(3))
    # Rows of the result are queries, those of all heads, groups of heads and samples included.
    pairs = elements_for_one(node) // size_for_one(value[-1]) * size_for_one(key[-2])
    return pairs * size_for_one(query[-1]), pairs * size_for_one(value[-1])


def _per_position(node: fx.Node) -> int:
    """Multiplications for one output of a convolution or linear layer, or for one input of a transposed one."""
    weight: Tensor = _argument(node, 1).meta["val"]
    return math.prod(size_for_one(size) for size in weight.shape[1:])


def _layer(node: fx.Node) -> int:
    return elements_for_one(node) * _per_position(node)


def _product(first: int) -> Callable[[fx.Node], int]:
    """A matrix product whose factors begin at an argument."""

    def count(node: fx.Node) -> int:
        return elements_for_one(node) * size_for_one(_shape(_argument(node, first))[-1])

    return count


def _einsum(node: fx.Node) -> int:
    """As ``torch.einsum`` computes it: two factors at a time, from the left."""
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    sizes: dict[str, int] = {}
    spelled = []
    for name, operand in zip(names, operands, strict=True):
        shape = [size_for_one(size) for size in _shape(operand)]
        letters = _spelled(name, len(shape))
        spelled.append(letters)
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    total, left = 0, set(spelled[0])
    for place, letters in enumerate(spelled[1:], 1):
        left |= set(letters)
        total += math.prod(sizes[letter] for letter in left)
        later = {letter for rest in spelled[place + 1 :] for letter in rest}
        left &= later | set(_spelled(result, None)) if "->" in equation else left
    return total


def _spelled(name: str, rank: int | None) -> Sequence[str]:
    """The letters of a factor, one for each axis; ``...`` stands for numbered ones, counted from the right."""
    before, dots, after = name.partition("...")
    if not dots:
        return list(name)
    hidden = 9 if rank is None else rank - len(before) - len(after)
    return [*before, *(str(number) for number in reversed(range(hidden))), *after]


def _attention(node: fx.Node) -> int:
    return sum(attention_macs(node))


def _argument(node: fx.Node, place: int) -> fx.Node:
    found = node.args[place]
    assert isinstance(found, fx.Node)
    return found


def _shape(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape  # type: ignore[no-any-return]


_COUNTERS: Mapping[object, Callable[[fx.Node], int]] = {
    **dict.fromkeys(CONVOLUTIONS, _layer),
    aten.linear.default: _layer,
    **dict.fromkeys(PRODUCTS, _product(0)),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    **dict.fromkeys(EINSUM, _einsum),
    SDPA: _attention,
}
