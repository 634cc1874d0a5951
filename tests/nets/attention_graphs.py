"""One attention as a graph of its own, with grids on the factors of its products as the compiler puts them there."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from nets.onnx_graphs import build, graph_of, normal
from nets.toy_recipes import recipe_with, softmax_grid, symmetric_grid
from numpy.typing import NDArray
from onnx import helper

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.finish.half_precision import HalfPrecision
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.passes.qdq.quantize_attention import QuantizeAttention
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import ProductRecipe, QuantRecipe
from tfmq_export.target import find_target

HEADS, LENGTH, SOURCE, SIZE = 2, 32, 16, 16
SCORES, RESULT = "attended_scores", "attended"
LAYERS = [LayerInfo(SCORES, "attn[qk]", "attention", 60, 0, 8), LayerInfo(RESULT, "attn[pv]", "attention", 40, 0, 8)]


def attention_model(mask: NDArray | None = None) -> onnx.ModelProto:
    """``attended = Attention(q, k, v)`` of heads that are split already, and turned back behind it."""
    shapes = {name: ("n", HEADS, LENGTH if name == "q" else SOURCE, SIZE) for name in "qkv"}
    constants = {} if mask is None else {"mask": mask}
    nodes = [
        helper.make_node("Attention", [*shapes, *constants], [RESULT], node_name(RESULT)),
        helper.make_node("Transpose", [RESULT], ["y"], "node_y", perm=[0, 2, 1, 3]),
    ]
    return build(nodes, shapes, {"y": ("n", LENGTH, HEADS, SIZE)}, constants)


def feeds(batch: int = 2) -> dict[str, NDArray]:
    return {
        name: normal(seed, batch, HEADS, LENGTH if name == "q" else SOURCE, SIZE) for seed, name in enumerate("qkv")
    }


def product_recipes() -> tuple[ProductRecipe, ProductRecipe]:
    q, k, v = feeds().values()
    return (
        ProductRecipe(SCORES, "attn[qk]", 60, symmetric_grid(q * SIZE**-0.5), symmetric_grid(k)),
        ProductRecipe(RESULT, "attn[pv]", 40, softmax_grid(), symmetric_grid(v)),
    )


def attention_recipe() -> QuantRecipe:
    return replace(recipe_with(), products=product_recipes())


def quantized_attention(target: str, mask: NDArray | None = None, floats: Collection[str] = ()) -> gs.Graph:
    """The graph a target runs.

    Args:
        floats: Factors whose grids are taken out again: "q", "k", "p", "v".
    """
    engine = find_target(target)
    recipe = adapt(attention_recipe(), engine)
    graph = graph_of(attention_model(mask))
    half = [HalfPrecision(recipe)] if engine.float_type == "float16" else []
    run_passes(graph, [LowerAttention("matmul"), QuantizeAttention(recipe, engine), *half])
    products = {node.name: node for node in graph.nodes}
    places = {"q": (SCORES, 0), "k": (SCORES, 1), "p": (RESULT, 0), "v": (RESULT, 1)}
    for factor in floats:
        name, position = places[factor]
        dequantize = products[node_name(name)].inputs[position].inputs[0]
        products[node_name(name)].inputs[position] = dequantize.inputs[0].inputs[0].inputs[0]
    return graph.cleanup().toposort()


def save_attention(path: Path, target: str, floats: Collection[str] = (), *, scaled: bool = False) -> Path:
    """Write it.

    Args:
        scaled: The scores are multiplied by a constant behind their product, as handwritten attention does.
    """
    graph = quantized_attention(target, floats=floats)
    if scaled:
        _scale_scores(graph)
    onnx.save(export_model(graph), path)
    return path


def _scale_scores(graph: gs.Graph) -> None:
    product = next(node for node in graph.nodes if node.name == node_name(SCORES))
    readers, scores = list(product.outputs[0].outputs), product.outputs[0]
    factor = gs.Constant("score_factor", np.asarray(0.25, scores.dtype))
    behind = gs.Variable("scaled_scores", scores.dtype, scores.shape)
    for reader in readers:
        reader.inputs[reader.inputs.index(scores)] = behind
    graph.nodes.append(gs.Node("Mul", "node_scaled_scores", {}, [scores, factor], [behind]))
    graph.toposort()
