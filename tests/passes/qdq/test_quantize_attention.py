from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.attention_graphs import (
    RESULT,
    SCORES,
    attention_model,
    attention_recipe,
    feeds,
    product_recipes,
    quantized_attention,
)
from nets.onnx_graphs import graph_of, infer, normal, ops
from nets.toy_recipes import softmax_grid
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Pass, run_passes
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.passes.qdq.quantize_attention import QuantizeAttention
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import find_target

TARGETS = ("ort-cpu", "openvino", "tensorrt-rtx")


def fake_quantize(x: NDArray, grid: QParams) -> NDArray:
    return np.clip(np.rint(x / grid.scale), grid.spec.qmin, grid.spec.qmax) * grid.scale


def expected(recipe: QuantRecipe, q: NDArray, k: NDArray, v: NDArray, mask: NDArray | None) -> NDArray:
    """Attention in numpy with fake-quantized factors."""
    qk, pv = recipe.products
    scaled = q * np.float32(q.shape[-1] ** -0.5)
    scores = fake_quantize(scaled, qk.left) @ fake_quantize(k, qk.right).swapaxes(-1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (fake_quantize(weights, pv.left) @ fake_quantize(v, pv.right)).swapaxes(1, 2)


@pytest.mark.parametrize("kind", ["none", "float", "bool"])
@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_both_products_multiply_what_fake_quant_multiplies(target: str, kind: str) -> None:
    mask = None if kind == "none" else normal(5, 1, 1, 32, 16)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True
    graph = quantized_attention(target, mask)

    (result,) = infer(export_model(graph), feeds())

    wanted = expected(adapt(attention_recipe(), find_target(target)), *feeds().values(), mask)
    # A softmax that lands on the other side of a tie moves one code of 255.
    assert np.abs(result - wanted).max() < 0.02
    assert np.linalg.norm(result - wanted) < 10 ** (-50 / 20) * np.linalg.norm(wanted)


def test_half_precision_leaves_the_products_in_full() -> None:
    target = "tensorrt-rtx"
    graph = quantized_attention(target)
    values = graph.tensors()

    (result,) = infer(export_model(graph), feeds())

    assert values[SCORES].dtype == np.float32
    wanted = expected(adapt(attention_recipe(), find_target(target)), *feeds().values(), None)
    assert np.linalg.norm(result - wanted) < 10 ** (-40 / 20) * np.linalg.norm(wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_codes_are_what_the_engine_multiplies(target: str) -> None:
    graph = quantized_attention(target)

    types = {node.name: node.outputs[0].dtype for node in graph.nodes if node.op == "QuantizeLinear"}
    of_softmax = types.pop(f"{RESULT}.left.quantize")
    assert of_softmax == (np.int8 if target == "tensorrt-rtx" else np.uint8)
    assert len(types) == 3
    assert set(types.values()) == {np.int8}
    assert "Clip" not in ops(graph)
    points = [node.inputs[2] for node in graph.nodes if node.op == "QuantizeLinear"]
    assert not any(np.any(point.values) for point in points)


def test_products_that_read_one_value_share_its_quantizer() -> None:
    qk, pv = product_recipes()
    model = attention_model()
    model.graph.node[0].input[2] = "k"  # k is v as well, once it is not transposed
    graph = graph_of(model)
    run_passes(graph, [LowerAttention("matmul")])
    for node in graph.nodes:
        if node.name == node_name(RESULT):
            node.inputs[1] = node.inputs[0]
    recipe = replace(attention_recipe(), products=(qk, replace(pv, left=pv.right)))

    run_passes(graph, [QuantizeAttention(recipe, find_target("ort-cpu"))])

    assert ops(graph).count("QuantizeLinear") == 3


def lowered() -> gs.Graph:
    graph = graph_of(attention_model())
    run_passes(graph, [LowerAttention("matmul")])
    return graph


def test_a_symmetric_engine_gets_no_unsigned_softmax() -> None:
    with pytest.raises(PreconditionError, match=r"attn\[pv\]: tensorrt needs a signed grid; adapt the recipe"):
        run_passes(lowered(), [QuantizeAttention(attention_recipe(), find_target("tensorrt"))])


def test_a_second_run_is_refused() -> None:
    graph = lowered()
    step: Pass = QuantizeAttention(attention_recipe(), find_target("ort-cpu"))
    run_passes(graph, [step])

    with pytest.raises(PreconditionError, match=r"attn\[qk\]: its factor .* is quantized already"):
        run_passes(graph, [step])


def test_fused_attention_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"no value attended_scores in the graph; run LowerAttention first"):
        run_passes(graph_of(attention_model()), [QuantizeAttention(attention_recipe(), find_target("ort-cpu"))])


def test_a_constant_factor_is_refused() -> None:
    graph = lowered()
    product = next(node for node in graph.nodes if node.name == node_name(RESULT))
    product.inputs[1] = gs.Constant("v_constant", np.ones((1, 2, 16, 16), np.float32))

    with pytest.raises(PreconditionError, match=r"attn\[pv\]: its factor v_constant is a constant"):
        run_passes(graph, [QuantizeAttention(attention_recipe(), find_target("ort-cpu"))])


def test_another_operation_under_the_name_is_refused() -> None:
    graph = lowered()
    recipe = attention_recipe()
    qk, pv = recipe.products
    softmax = next(node.outputs[0].name for node in graph.nodes if node.op == "Softmax")

    with pytest.raises(PreconditionError, match=r"attn\[qk\]: .* is computed by Softmax, not by MatMul"):
        run_passes(graph, [QuantizeAttention(replace(recipe, products=(replace(qk, name=softmax), pv)), ORT)])


ORT = find_target("ort-cpu")


@pytest.mark.parametrize("factor", ["q", "k", "p", "v"])
def test_the_last_check_sees_a_factor_in_floating_point(factor: str) -> None:
    graph = quantized_attention("ort-cpu", floats=factor)

    with pytest.raises(PostconditionError, match=r"attn\[(qk|pv)\]: reads .*, which is no integer"):
        CheckModel(attention_recipe(), ORT, "timestep").ensures(graph)


def test_a_product_that_is_gone_is_missed() -> None:
    graph = quantized_attention("ort-cpu")
    for node in graph.nodes:
        node.name = node.name.replace(node_name(SCORES), "fused")

    with pytest.raises(PostconditionError, match=r"attn\[qk\]: its node node_attended_scores is gone"):
        CheckModel(attention_recipe(), ORT, "timestep").ensures(graph)


def test_a_softmax_grid_starts_at_zero() -> None:
    assert softmax_grid().zero_point == 0
    onnx.checker.check_model(export_model(quantized_attention("ort-cpu")))
