"""Lower ai.onnx Attention, in one of two forms.

    Attention(q, k, v, mask)  ==  Softmax(q k^T * scale + mask) v        q, k, v: [B, H, L, D]

``matmul`` spells that out with ordinary nodes, for every engine. ``mha`` is ONNX Runtime's
com.microsoft.MultiHeadAttention, which takes heads side by side, [B, L, H * D]: it replaces the Reshape and
Transpose that split the heads before, and those that join them after. Where they are not around, ``mha``
leaves the node alone, and ``matmul`` can follow it. On one CPU thread ``mha`` takes 0.8 of the time at 1024
tokens and more, and the same below 256.

Masks broadcast (``attention_mask.py``), and heads of k and v that several heads of q share are gathered.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import producer, read_instead, sole_consumer
from tfmq_export.passes.lower.attention_mask import (
    HIDDEN,
    as_bias,
    bias_obstacle,
    mask_obstacle,
    may_hide_all,
    zero_unseeing,
)
from tfmq_export.passes.reading import Shape, Size, computed, float_attribute, known_shape, static_size
from tfmq_export.recipe.names import node_name, scores_name

Form = Literal["matmul", "mha"]

SWAP_HEADS = [0, 2, 1, 3]
"""Between [B, L, H, D] and [B, H, L, D]; its own inverse."""

TURN_MATRICES = [0, 1, 3, 2]
"""Between [B, H, L, D] and [B, H, D, L]; its own inverse."""


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Attention -> MatMul, Softmax, MatMul; or -> MultiHeadAttention.

    Attributes:
        form: "matmul" for every engine, "mha" for ONNX Runtime only.
    """

    form: Form
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        changed: list[str] = []
        skipped: list[tuple[str, str]] = []
        for node in attention_nodes(graph):
            reason = self.obstacle(graph, node)
            if reason is not None:
                skipped.append((node.name, reason))
                continue
            if self.form == "mha":
                lower_to_mha(graph, node)
            else:
                lower_to_matmul(graph, node)
            changed.append(node.name)
        return Changes(tuple(changed), tuple(skipped))

    def ensures(self, graph: gs.Graph) -> None:
        for node in attention_nodes(graph):
            if self.obstacle(graph, node) is None:
                raise PostconditionError(f"{node.name}: still an Attention node")

    def obstacle(self, graph: gs.Graph, node: gs.Node) -> str | None:
        """Why this node cannot take the form; None if it can."""
        return unsupported(node) or (no_head_split(graph, node) if self.form == "mha" else None)


def attention_nodes(graph: gs.Graph) -> list[gs.Node]:
    """The ai.onnx ones; com.microsoft has an Attention of its own."""
    return [node for node in graph.nodes if node.op == "Attention" and not node.domain]


def unsupported(node: gs.Node) -> str | None:
    """Why neither form computes this node."""
    attrs = node.attrs
    if attrs.get("is_causal", 0):
        return "is_causal is not lowered"
    if attrs.get("softcap", 0.0):
        return "softcap is not lowered"
    if attrs.get("softmax_precision", 1) != 1:
        return "softmax_precision other than float32 is not lowered"
    if any(given(tensor) for tensor in node.inputs[4:]):
        return "past keys and values are not lowered"
    if any(given(tensor) for tensor in node.outputs[1:]):
        return "outputs besides Y are not lowered"
    shapes = [tensor.shape for tensor in node.inputs[:3]]
    known = [shape for shape in shapes if shape is not None and len(shape) == 4]
    if len(known) < len(shapes):
        return f"needs q, k, v of shape [B, H, L, D], got {shapes}"
    q, k, v = known
    if k[1] != v[1] or (q[1] != k[1] and not (isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0)):
        return f"heads do not divide into groups: {q[1]} for q, {k[1]} for k, {v[1]} for v"
    if not isinstance(q[3], int):
        return f"the size of a head is not static: {q[3]}"
    if any(tensor.dtype != np.float32 for tensor in node.inputs[:3]):
        return f"needs float32, got {[str(tensor.dtype) for tensor in node.inputs[:3]]}"
    mask = attention_mask(node)
    return None if mask is None else mask_obstacle(mask)


def no_head_split(graph: gs.Graph, node: gs.Node) -> str | None:
    """Why MultiHeadAttention cannot stand in for the node and the head split around it."""
    if shares_heads(node):
        return "its heads share keys and values"
    for name, tensor in zip("qkv", node.inputs[:3], strict=True):
        if merged_heads(tensor) is None:
            return f"{name} is not split into heads by Reshape and Transpose"
    if joining_reshape(graph, node.outputs[0]) is None:
        return "its heads are not joined by Transpose and Reshape"
    mask = attention_mask(node)
    return None if mask is None else bias_obstacle(mask, *scores_size(node))


def scores_size(node: gs.Node) -> tuple[Size, Size]:
    """How many queries and how many keys there are."""
    return known_shape(node.inputs[0])[2], known_shape(node.inputs[1])[2]


def shares_heads(node: gs.Node) -> bool:
    """Whether several heads of q read one head of k and v."""
    return bool(known_shape(node.inputs[0])[1] != known_shape(node.inputs[1])[1])


def given(tensor: gs.Tensor) -> bool:
    """Whether an optional input or output is there."""
    return bool(tensor.name)


def attention_mask(node: gs.Node) -> gs.Tensor | None:
    """What is added to the scores, or which of them count; None if there is no mask."""
    return node.inputs[3] if len(node.inputs) > 3 and given(node.inputs[3]) else None


def softmax_scale(node: gs.Node) -> float:
    """The factor on ``q k^T``; ``1 / sqrt(D)`` unless the node names another."""
    return float_attribute(node, "scale", static_size(node.inputs[0], 3) ** -0.5)


def merged_heads(tensor: gs.Tensor) -> gs.Tensor | None:
    """The [B, L, H * D] tensor that Reshape and Transpose split into ``tensor``, [B, H, L, D]."""
    transpose = producer(tensor, "Transpose")
    if transpose is None or transpose.attrs.get("perm") != SWAP_HEADS:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    merged, split = reshape.inputs[0], transpose.inputs[0]
    if merged.shape is None or split.shape is None:
        return None
    _, heads, _, size = known_shape(tensor)
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    splits_last = list(split.shape) == [*merged.shape[:2], heads, size]
    return merged if splits_last and list(merged.shape[2:]) == [heads * size] else None


def joining_reshape(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The Reshape to [B, L, H * D] that, after a Transpose, is all that reads ``tensor``, [B, H, L, D]."""
    transpose = sole_consumer(graph, tensor, "Transpose")
    if transpose is None or transpose.attrs.get("perm") != SWAP_HEADS:
        return None
    reshape = sole_consumer(graph, transpose.outputs[0], "Reshape")
    joined = None if reshape is None else reshape.outputs[0].shape
    if joined is None or tensor.shape is None:
        return None
    batch, heads, length, size = tensor.shape
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return reshape if list(joined) == [batch, length, heads * size] else None


def lower_to_mha(graph: gs.Graph, node: gs.Node) -> None:
    """Put MultiHeadAttention in place of the node and of the head split around it."""
    reshape = joining_reshape(graph, node.outputs[0])
    inputs = [merged for merged in map(merged_heads, node.inputs[:3]) if merged is not None]
    assert reshape is not None
    assert len(inputs) == 3  # ``no_head_split`` looked
    (joined,) = reshape.outputs
    mask = attention_mask(node)
    reshape.outputs.clear()
    if mask is not None:
        bias = as_bias(graph, mask, node.name, *scores_size(node))
        inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]  # no projection bias, no key padding mask
        if may_hide_all(mask):
            attended = gs.Variable(f"{node.name}_attended", np.float32, joined.shape)
            zero_unseeing(graph, mask, attended, joined, node.name, heads_joined=True)
            joined = attended
    graph.nodes.append(
        gs.Node(
            "MultiHeadAttention",
            node.name,
            {"num_heads": static_size(node.inputs[0], 1), "scale": softmax_scale(node)},
            inputs,
            [joined],
            domain="com.microsoft",
        )
    )
    node.outputs.clear()


def lower_to_matmul(graph: gs.Graph, node: gs.Node) -> None:
    """Spell the node out; ORT merges the transpose and the scale into the first MatMul."""
    if shares_heads(node):
        repeat_heads(graph, node)
    q, k, v = node.inputs[:3]
    (y,) = node.outputs[:1]
    batch, heads, length, size = known_shape(q)
    source = known_shape(k)[2]
    name = node.name
    scored = scores_name(y.name)
    scores_shape = [batch, heads, length, source]

    def emit(op: str, suffix: str, inputs: list[gs.Tensor], shape: Shape, **attrs: object) -> gs.Variable:
        output = gs.Variable(f"{name}_{suffix}", np.float32, shape)
        graph.nodes.append(gs.Node(op, f"{name}_{suffix}", attrs, inputs, [output]))
        return output

    scale = gs.Constant(f"{name}_scale", np.array(softmax_scale(node), np.float32))
    scaled = emit("Mul", "scaled_q", [q, scale], [batch, heads, length, size])
    transposed = emit("Transpose", "transposed_k", [k], [batch, heads, size, source], perm=TURN_MATRICES)
    scores = gs.Variable(scored, np.float32, scores_shape)
    graph.nodes.append(gs.Node("MatMul", node_name(scored), {}, [scaled, transposed], [scores]))
    mask = attention_mask(node)
    if mask is not None and mask.dtype == np.bool_:
        hidden = gs.Constant(f"{name}_hidden", HIDDEN)
        scores = emit("Where", "masked_scores", [mask, scores, hidden], scores_shape)
    elif mask is not None:
        scores = emit("Add", "masked_scores", [scores, mask], scores_shape)
    weights = emit("Softmax", "weights", [scores], scores_shape, axis=-1)
    node.outputs.clear()
    graph.nodes.append(gs.Node("MatMul", name, {}, [weights, v], [y]))
    if mask is not None and may_hide_all(mask):
        # The product keeps its name, by which the recipe knows it.
        result = gs.Variable(f"{name}_result", np.float32, y.shape)
        read_instead(y, result)
        graph.outputs = [result if value is y else value for value in graph.outputs]
        zero_unseeing(graph, mask, computed(y), result, name, heads_joined=False)


def repeat_heads(graph: gs.Graph, node: gs.Node) -> None:
    """Give each head of q a head of k and v of its own, [B, H, S, D]."""
    heads, shared = static_size(node.inputs[0], 1), static_size(node.inputs[1], 1)
    places = gs.Constant(f"{node.name}_heads", np.arange(heads, dtype=np.int64) // (heads // shared))
    for position, name in ((1, "k"), (2, "v")):
        value = node.inputs[position]
        batch, _, source, size = known_shape(value)
        repeated = gs.Variable(f"{node.name}_repeated_{name}", np.float32, [batch, heads, source, size])
        graph.nodes.append(gs.Node("Gather", f"{node.name}_repeat_{name}", {"axis": 1}, [value, places], [repeated]))
        node.inputs[position] = repeated
