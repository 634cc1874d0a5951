"""``s (q - z) W + b == s q W + (b - s z sum W)``, through ONNX Runtime's reference numerics."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import OUT, computed, float_model, float_weight, input_grid, sample, scaled_layer
from nets.toy_nets import node
from nets.toy_recipes import ORT_CPU, layer_recipe, recipe_with

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.fold_zero_points import FoldZeroPoints
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target, find_target

OPENVINO = find_target("openvino")
LINEAR = ("MatMul", "Gemm", "Gemm transposed")
BIAS = normal(1, OUT)


def quantized(op: str, layer: LayerRecipe, target: Target) -> gs.Graph:
    recipe = recipe_with([layer])
    graph = graph_of(float_model(op, float_weight(op), BIAS))
    run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, target), QuantizeWeights(recipe, target)])
    return graph


def fold(graph: gs.Graph, *layers: LayerRecipe, target: Target = OPENVINO) -> PassReport:
    (report,) = run_passes(graph, [FoldZeroPoints(recipe_with(layers), target)])
    return report


def dequantizers(graph: gs.Graph) -> list[gs.Node]:
    """Of activations."""
    return [item for item in graph.nodes if item.op == "DequantizeLinear" and item.inputs[0].dtype == np.uint8]


@pytest.mark.parametrize("target", [OPENVINO, ORT_CPU], ids=lambda target: target.name)
@pytest.mark.parametrize("op", LINEAR)
@given(zero_point=st.integers(1, 255), bits=st.sampled_from([4, 8]), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_the_layer_computes_the_same(op: str, target: Target, zero_point: int, bits: int, seed: int) -> None:
    layer = scaled_layer(op, input_grid(0.05, zero_point), None, bits, None, None)
    graph = quantized(op, layer, target)

    report = fold(graph, layer, target=target)

    assert report.changed == (layer.path,)
    (dequantize,) = dequantizers(graph)
    assert len(dequantize.inputs) == 2
    (quantize,) = (item for item in graph.nodes if item.op == "QuantizeLinear")
    assert quantize.inputs[2].values == zero_point  # the codes stay what they were
    x = sample(op, seed)
    (actual,) = infer(export_model(graph), {"x": x})
    step = float((layer.input.scale * layer.weight_step).max())  # of a bias as integers
    expected = computed(op, layer, BIAS, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=step + 4e-6 * np.abs(expected).max() + 1e-5)


def test_exponents_count_in_the_sums() -> None:
    layer = scaled_layer("MatMul", input_grid(0.05, 77), None, 4, None, np.array([0, -2, -1, 0], np.int8))
    recipe = recipe_with([layer])
    graph = graph_of(float_model("MatMul", float_weight("MatMul"), BIAS))
    insert, quantize = InsertQdq(recipe, OPENVINO), QuantizeWeights(recipe, OPENVINO)
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe), insert, quantize])
    x = sample("MatMul")
    (before,) = infer(export_model(graph), {"x": x})

    fold(graph, layer)

    (after,) = infer(export_model(graph), {"x": x})
    np.testing.assert_allclose(after, before, rtol=0, atol=4e-6 * np.abs(before).max() + 1e-5)


def test_layers_that_read_one_value_share_its_codes() -> None:
    weights = {"w": normal(1, 4, 6), "v": normal(2, 4, 5)}
    nodes = [node("MatMul", "x w", "linear"), node("MatMul", "x v", "linear_1")]
    graph = graph_of(build(nodes, {"x": ("n", 3, 4)}, {"linear": ("n", 3, 6), "linear_1": ("n", 3, 5)}, weights))
    grid = input_grid(0.05, 100)
    layers = [
        layer_recipe(name, "linear", weight.T, grid, None, 8)
        for name, weight in (("linear", weights["w"]), ("linear_1", weights["v"]))
    ]
    recipe = recipe_with(layers)
    run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, OPENVINO), QuantizeWeights(recipe, OPENVINO)])
    x = normal(3, 2, 3, 4)
    before = infer(export_model(graph), {"x": x})

    fold(graph, *layers)

    assert ops(graph).count("QuantizeLinear") == 1
    assert len(dequantizers(graph)) == 1
    for actual, expected in zip(infer(export_model(graph), {"x": x}), before, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("op", "zero_point"), [("Conv", 100), ("MatMul", 0)])
def test_convolutions_and_grids_that_start_at_zero_stay(op: str, zero_point: int) -> None:
    layer = scaled_layer(op, input_grid(0.05, zero_point), None, 8, None, None)
    graph = quantized(op, layer, OPENVINO)
    before = ops(graph)

    assert fold(graph, layer).changed == ()
    assert ops(graph) == before


def test_a_second_run_changes_nothing() -> None:
    layer = scaled_layer("MatMul", input_grid(0.05, 100), None, 8, None, None)
    graph = quantized("MatMul", layer, OPENVINO)
    fold(graph, layer)

    assert fold(graph, layer).changed == ()


def test_weights_must_be_quantized_before() -> None:
    layer = scaled_layer("MatMul", input_grid(0.05, 100), None, 8, None, None)
    recipe = recipe_with([layer])
    graph = graph_of(float_model("MatMul", float_weight("MatMul"), BIAS))
    run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, OPENVINO)])

    with pytest.raises(PreconditionError, match="run QuantizeWeights first"):
        fold(graph, layer)


def test_a_zero_point_left_behind_breaks_the_promise() -> None:
    layer = scaled_layer("MatMul", input_grid(0.05, 100), None, 8, None, None)
    graph = quantized("MatMul", layer, OPENVINO)

    with pytest.raises(PostconditionError, match="still has a zero point"):
        FoldZeroPoints(recipe_with([layer]), OPENVINO).ensures(graph)


@pytest.mark.parametrize("op", LINEAR)
def test_stripping_gives_the_bias_back(op: str) -> None:
    layer = scaled_layer(op, input_grid(0.05, 100), None, 8, None, None)
    graph = quantized(op, layer, OPENVINO)
    twin = quantized(op, layer, OPENVINO)
    fold(graph, layer)

    run_passes(graph, [StripQdq()])
    run_passes(twin, [StripQdq()])

    x = sample(op)
    (actual,), (expected,) = (infer(export_model(made), {"x": x}) for made in (graph, twin))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_stripping_leaves_no_bias_where_there_was_none() -> None:
    weight = normal(1, 6, 4)
    layer = layer_recipe("linear", "linear", weight, input_grid(0.05, 100))
    model = build(
        [node("MatMul", "x w", "linear")], {"x": ("n", 3, 4)}, {"linear": ("n", 3, 6)}, {"w": weight.T.copy()}
    )
    recipe, graph = recipe_with([layer]), graph_of(model)
    run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, OPENVINO), QuantizeWeights(recipe, OPENVINO)])
    fold(graph, layer)
    assert "Add" in ops(graph)

    run_passes(graph, [StripQdq()])

    assert ops(graph) == ["MatMul"]
    (product,) = graph.nodes
    np.testing.assert_allclose(product.inputs[1].values.T, layer.weight_codes * layer.weight.scale[:, None], rtol=1e-6)
