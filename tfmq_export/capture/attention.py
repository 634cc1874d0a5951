"""The two products of attention in a captured graph: both factors of each are activations.

    scores = (q / sqrt D) k^T        result = p v        p = softmax(scores + mask), in [0, 1]

Found by data dependence, as everything else: ``scaled_dot_product_attention``, or a softmax between two products.
Where an attention cannot run in integers both its products stay in floating point, because one alone is slower than
none (docs/tensorrt.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tfmq_export.capture.dependences import LAYOUT, SAMPLE, TIMESTEP, module_path
from tfmq_export.capture.macs import PRODUCTS, SDPA, attention_macs, macs_of
from tfmq_export.recipe.names import scores_name

aten = torch.ops.aten

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
# Products in a spelling that no pass brings into the form of a MatMul.
OTHER_PRODUCTS = frozenset({aten.einsum.default, aten.baddbmm.default})
# What may stand between the scores and their softmax: a scale, a mask.
ON_SCORES = frozenset(
    {aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.mul.Scalar}
    | {aten.div.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther}
)
HEADS_RANK = 4  # [B, H, L, D]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionProduct:
    """One product of two activations.

    Attributes:
        name: Its value in the graph once attention is spelled out.
        source: The node that computes it as captured.
        path: Module path that issued it, with ``[qk]`` or ``[pv]`` behind.
        macs: Multiply-accumulates for one sample.
        of_softmax: Whether its first factor is the softmax.
        obstacle: Why it has to stay in floating point; empty where it can run in integers.
    """

    name: str
    source: str
    path: str
    macs: int
    of_softmax: bool
    obstacle: str = ""


def find_attention(graph: fx.Graph, depends: Mapping[str, frozenset[str]]) -> tuple[AttentionProduct, ...]:
    """Every product of every attention, in forward order; not what depends on the timestep alone.

    Args:
        depends: From ``analysis.dependences``.
    """
    found: list[AttentionProduct] = []
    for node in graph.nodes:
        if depends[node.name] <= {TIMESTEP}:
            continue
        if node.target is SDPA:
            found += _of_one_node(node, depends)
        elif node.target in PRODUCTS | OTHER_PRODUCTS:
            scores = _scores_of(node)
            if scores is not None:
                found += _of_two_nodes(scores, node, depends)
    return tuple(found)


def _of_one_node(node: fx.Node, depends: Mapping[str, frozenset[str]]) -> Iterator[AttentionProduct]:
    obstacle = _sdpa_obstacle(node, depends)
    names = (scores_name(node.name), node.name)
    for name, kind, macs in zip(names, ("qk", "pv"), attention_macs(node), strict=True):
        path = f"{module_path(node)}[{kind}]"
        yield AttentionProduct(name, node.name, path, macs, kind == "pv", obstacle)


def _of_two_nodes(
    scores: fx.Node, result: fx.Node, depends: Mapping[str, frozenset[str]]
) -> Iterator[AttentionProduct]:
    obstacle = _sample_obstacle(result, depends)
    for node in (scores, result):
        if node.target in OTHER_PRODUCTS:
            obstacle = f"it is written as {node.target.__name__.partition('.')[0]}; write it as torch.matmul"
        elif any(not depends[source.name] for source in _factors(node)):
            obstacle = "one of its factors is a bare parameter"
    softmax = _behind_layout(_factors(result)[0])
    if not obstacle and softmax.target not in SOFTMAX:
        obstacle = "its softmax is the second factor; write p @ v"
    elif not obstacle and softmax.args[1] % softmax.meta["val"].ndim != softmax.meta["val"].ndim - 1:
        obstacle = "its softmax is not over the keys"  # which no engine has a kernel of attention for
    for node, kind in ((scores, "qk"), (result, "pv")):
        if any(not depends[source.name] for source in _factors(node)):
            continue  # a product with a bare parameter is an operation of its own
        path = f"{module_path(node)}[{kind}]"
        yield AttentionProduct(node.name, node.name, path, macs_of(node), kind == "pv", obstacle)


def _sdpa_obstacle(node: fx.Node, depends: Mapping[str, frozenset[str]]) -> str:
    options = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    options |= node.kwargs
    for name in ("is_causal", "enable_gqa", "dropout_p"):
        if options.get(name):
            return f"{name} is not lowered to integers"
    shapes = [_shape(source) for source in _factors(node)]
    if any(len(shape) != HEADS_RANK or not isinstance(shape[-1], int) for shape in shapes):
        return "its factors are not [batch, heads, length, channels] with static sizes"
    if len({shape[1] for shape in shapes}) > 1:
        return "grouped heads are not lowered to integers"
    return _sample_obstacle(node, depends)


def _sample_obstacle(node: fx.Node, depends: Mapping[str, frozenset[str]]) -> str:
    return "" if SAMPLE in depends[node.name] else "computed once per image: it does not see the sample"


def _scores_of(product: fx.Node) -> fx.Node | None:
    """The product whose softmax is one of the factors."""
    for factor in _factors(product):
        softmax = _behind_layout(factor)
        if softmax.target in SOFTMAX:
            return _product_behind(softmax.all_input_nodes[0])
    return None


def _product_behind(node: fx.Node) -> fx.Node | None:
    """The product that scores come from, behind scales, masks and layout."""
    if node.target in PRODUCTS | OTHER_PRODUCTS:
        return node
    if node.target not in ON_SCORES | LAYOUT:
        return None
    return next((found for source in node.all_input_nodes if (found := _product_behind(source)) is not None), None)


def _behind_layout(node: fx.Node) -> fx.Node:
    while node.target in LAYOUT:
        node = node.all_input_nodes[0]
    return node


def _factors(node: fx.Node) -> list[fx.Node]:
    """The tensors that are multiplied; of ``scaled_dot_product_attention`` q, k and v."""
    if node.target is aten.einsum.default:
        return list(node.all_input_nodes)
    last = 3 if node.target is SDPA else 2
    first = 1 if node.target is aten.baddbmm.default else 0
    given: Any = node.args[first : first + last]
    return list(given)


def _shape(node: fx.Node) -> Any:
    return node.meta["val"].shape
