"""Write attention out as matrix products and a softmax, so that the factors of both products can be quantized.

    scaled_dot_product_attention(q, k, v, mask)  ==  softmax((q scale) k^T + mask) v

``passes/lower/attention.py`` does the same in ONNX; both give the scores the same name.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tfmq_export.capture.attention import AttentionProduct
from tfmq_export.capture.macs import SDPA
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.recipe.names import scores_name
from tfmq_export.recipe.recipe import FloatLayer

aten = torch.ops.aten

OFF = "attention products stay in floating point unless --attention integer asks for more"


def integer_products(program: DiffusionProgram) -> tuple[AttentionProduct, ...]:
    """The products that can run in integers."""
    return tuple(product for product in program.attention if not product.obstacle)


def float_products(program: DiffusionProgram, reason: str | None = None) -> tuple[FloatLayer, ...]:
    """The products that stay in floating point.

    Args:
        reason: Why all of them do; None where only those with an obstacle do.
    """
    left = [product for product in program.attention if reason is not None or product.obstacle]
    return tuple(FloatLayer(x.name, x.path, x.macs, x.obstacle or str(reason)) for x in left)


def spell_attention(program: DiffusionProgram) -> DiffusionProgram:
    """A program without ``scaled_dot_product_attention`` where its products can run in integers."""
    wanted = {product.source for product in integer_products(program)}
    module = fx.GraphModule(program.module, copy.deepcopy(program.module.graph))
    for node in list(module.graph.nodes):
        if node.target is SDPA and node.name in wanted:
            _spell(module.graph, node)
    module.graph.lint()
    module.recompile()
    return replace(program, module=module)


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    q, k, v, *rest = node.args
    given: Any = {"attn_mask": rest[0] if rest else None} | node.kwargs
    mask, scale = given["attn_mask"], given.get("scale")
    shapes: Any = [source.meta["val"].shape for source in (q, k)]  # type: ignore[union-attr]
    scale = shapes[0][-1] ** -0.5 if scale is None else scale
    scored = (*shapes[0][:-1], shapes[1][-2])

    def emit(target: Any, args: tuple[Any, ...], like: fx.Node, shape: Any, name: str | None = None) -> fx.Node:
        made = graph.create_node("call_function", target, args, name=name)
        made.meta |= {key: value for key, value in node.meta.items() if key != "val"}
        made.meta["val"] = like.meta["val"].new_empty(shape)
        return made

    with graph.inserting_before(node):
        scaled = emit(aten.mul.Tensor, (q, scale), q, shapes[0])  # type: ignore[arg-type]
        turned = emit(aten.transpose.int, (k, -2, -1), k, (*shapes[1][:-2], shapes[1][-1], shapes[1][-2]))  # type: ignore[arg-type]
        scores = emit(aten.matmul.default, (scaled, turned), scaled, scored, scores_name(node.name))
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            scores = emit(aten.where.ScalarOther, (mask, scores, torch.finfo(torch.float32).min), scores, scored)
        elif mask is not None:
            scores = emit(aten.add.Tensor, (scores, mask), scores, scored)
        weights = emit(aten.softmax.int, (scores, -1), scores, scored)
        result = attended = emit(aten.matmul.default, (weights, v), scores, node.meta["val"].shape)
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            sees = emit(aten.any.dim, (mask, -1, True), mask, (*mask.meta["val"].shape[:-1], 1))
            attended = emit(aten.mul.Tensor, (result, sees), scores, node.meta["val"].shape)  # 0 where no key is seen
        # Fused kernels leave [B, L, H, D] in memory, and what joins the heads may take a view of that.
        batch, heads, length, size = node.meta["val"].shape
        swapped = emit(aten.transpose.int, (attended, 1, 2), scores, (batch, length, heads, size))
        stored = emit(aten.contiguous.default, (swapped,), scores, (batch, length, heads, size))
        behind = emit(aten.transpose.int, (stored, 1, 2), scores, node.meta["val"].shape)
    name = node.name
    node.replace_all_uses_with(behind)
    graph.erase_node(node)
    result.name = name
