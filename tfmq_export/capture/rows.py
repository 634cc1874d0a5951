"""Where a captured value holds the samples of a batch.

A sample may have several rows of an axis: the frames of a video, the windows of a picture, the heads of an attention.
They can be told apart again only where they lie sample after sample, which ``repeat_interleave`` and a view leave
behind, and ``repeat`` and a concatenation of whole batches do not.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Operations that keep the order of all numbers.
IN_ORDER = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
    | {aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default}
)
REPEATS_EACH = frozenset({aten.repeat_interleave.self_int})


def size_for_one(size: Any) -> int:
    """A size of the graph, when there is one sample."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def elements_for_one(node: fx.Node) -> int:
    """Elements of a value for one sample, whatever its batch axis holds besides."""
    return math.prod(size_for_one(size) for size in node.meta["val"].shape)


def rows_per_sample(node: fx.Node) -> int | None:
    """Rows of axis 0 that each sample has; 0 for a scalar, None where axis 0 is not the batch."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if value.ndim == 0:
        return 0
    if batch_axis(value.shape) != 0:
        return None
    return _factor(value.shape[0])


def batch_axis(shape: Sequence[Any]) -> int | None:
    """The only axis whose size varies; None where there are none or several."""
    varying = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    return varying[0] if len(varying) == 1 else None


def mixed_rows(graph: fx.Graph) -> frozenset[fx.Node]:
    """Values with several rows per sample that may not lie sample after sample."""
    mixed: set[fx.Node] = set()
    for node in graph.nodes:
        shape = _shape(node)
        axis = batch_axis(shape)
        if axis is not None and _factor(shape[axis]) != 1 and not _lies_in_order(node, shape, axis, mixed):
            mixed.add(node)
    return frozenset(mixed)


def _lies_in_order(node: fx.Node, shape: Sequence[Any], axis: int, mixed: set[fx.Node]) -> bool:
    if node.op == "placeholder":
        return True
    held = [(source, _shape(source)) for source in node.all_input_nodes]
    sources = [(source, theirs, at) for source, theirs in held if (at := batch_axis(theirs)) is not None]
    if not sources or any(source in mixed for source, *_ in sources):
        return False
    if node.target in IN_ORDER:
        _, theirs, at = sources[0]
        return bool(math.prod(theirs[:at]) == math.prod(shape[:axis]))
    if node.target in REPEATS_EACH:
        return True
    # Whatever else computes on several rows found them there.
    factor = _factor(shape[axis])
    return factor is not None and any(_factor(theirs[at]) == factor for _, theirs, at in sources)


def _shape(node: fx.Node) -> Sequence[Any]:
    """Of a value, or of the first where there are several."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.shape if isinstance(value, Tensor) else ()


def _factor(size: Any) -> int | None:
    """What the batch is multiplied by in a size; None where it is not."""
    expression = size.node.expr
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = expression.free_symbols
    factor = expression / symbol
    return int(factor) if factor.is_integer and factor.is_number else None
