"""Factors that move into layers of the recipe. What else takes one: test_absorb_factor.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.factor_graphs import TOKENS, C, L, assert_stays, behind_norm, folded
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import node, vector_net
from nets.toy_recipes import activation_grid, layer_recipe, recipe_for, recipe_with
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.fold_rescales import FoldRescales
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.target import find_target


def two_layers(op: str) -> tuple[onnx.ModelProto, tuple[LayerRecipe, LayerRecipe]]:
    """A layer and, behind a Relu, a scaled one."""
    weights = normal(1, C, 4), normal(2, 3, C)
    tau = np.float32([0.5, 3.1, 0.27, 1.9, 0.7, 1.1])
    shape = ("n", 4) if op == "Gemm" else ("n", L, 4)
    grid = activation_grid(np.float32([-4, 4]))
    first = layer_recipe("linear", "linear", weights[0], grid, bits=4)
    wide = activation_grid(np.float32([0, 60]))
    second = replace(layer_recipe("linear_1", "linear", weights[1] * tau, wide), les_scale=tau)
    if op == "Gemm":
        nodes = [node("Gemm", "x w b", "linear", transB=1), node("Relu", "linear", "relu")]
        nodes.append(node("Gemm", "relu w1 b1", "linear_1", transB=1))
    else:
        nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear"), node("Relu", "linear", "relu")]
        nodes += [node("MatMul", "relu w1", "product_1"), node("Add", "product_1 b1", "linear_1")]
        weights = weights[0].T.copy(), weights[1].T.copy()
    constants = {"w": weights[0], "b": normal(3, C), "w1": weights[1], "b1": normal(4, 3)}
    model = build(nodes, {"x": shape}, {"linear_1": (*shape[:-1], 3)}, constants)
    return model, (first, second)


def quantized(model: onnx.ModelProto, layers: Sequence[LayerRecipe]) -> gs.Graph:
    recipe, graph = recipe_with(layers), graph_of(model)
    ort_cpu = find_target("ort-cpu")
    before = [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ort_cpu)]
    run_passes(graph, [*before, QuantizeWeights(recipe, ort_cpu)])
    return graph


def stored(graph: gs.Graph) -> dict[str, NDArray]:
    return {item.name: numpy_helper.to_array(item) for item in export_model(graph).graph.initializer}


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_quantized_layer_keeps_its_integers_and_its_kernel(op: str, tmp_path: Path) -> None:
    model, layers = two_layers(op)
    before, graph = quantized(model, layers), quantized(model, layers)

    (report,) = run_passes(graph, [FoldRescales(recipe_with(layers))])

    assert report.changed == ("relu.rescale",)
    old, new = stored(before), stored(graph)
    np.testing.assert_array_equal(new["linear.weight_codes"], old["linear.weight_codes"])
    factor = layers[1].input_factor
    np.testing.assert_array_equal(new["linear.weight_scale"], old["linear.weight_scale"] * factor)
    if op == "Gemm":
        np.testing.assert_array_equal(new["linear.bias_codes"], old["linear.bias_codes"])
        step = layers[0].input.scale * new["linear.weight_scale"]  # exactly, or the kernel is a float one
        np.testing.assert_array_equal(new["linear.bias_scale"], step)
    x = normal(5, *((7, 4) if op == "Gemm" else (7, L, 4)))
    results = [infer(export_model(item), {"x": x})[0] for item in (before, graph)]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)
    save_graph(graph, tmp_path / "model.onnx")
    asked = [LayerInfo(x.name, x.path, x.kind, x.macs, x.weight.spec.bits, 8) for x in layers]
    realized_on_ort(tmp_path / "model.onnx", asked).raise_if_lost()


def test_a_value_that_carries_a_factor_has_another_name() -> None:
    model, layers = two_layers("MatMul")
    graph = quantized(model, layers)

    run_passes(graph, [FoldRescales(recipe_with(layers))])

    assert {"linear.scaled", "linear_1"} <= set(graph.tensors())
    assert "linear" not in graph.tensors()


def test_a_layer_whose_output_has_a_grid_cannot_take_a_factor() -> None:
    model, (first, second) = two_layers("Gemm")
    graph = quantized(model, [replace(first, output=activation_grid(np.float32([-9, 9]))), second])

    (report,) = run_passes(graph, [FoldRescales(recipe_with([first, second]))])

    assert report.skipped == (("relu.rescale", "linear is quantized"),)


def test_a_relu_that_is_not_quantized_keeps_the_factor_in_front_of_it() -> None:
    model = behind_norm([], "normed")
    model.graph.node[-1].op_type = "Relu"

    assert_stays(model, "node_y is not quantized next")


def test_float_weights_are_refused() -> None:
    net = vector_net()
    recipe, graph = recipe_for(net), graph_of(net.model)
    run_passes(graph, [BindRecipe(recipe)])

    with pytest.raises(PreconditionError, match=r"net.linear: its weight is not quantized; run QuantizeWeights first"):
        run_passes(graph, [FoldRescales(recipe)])


def test_who_shares_a_constant_keeps_it() -> None:
    model = behind_norm([node("LayerNormalization", "x gamma beta", "other", epsilon=1.0)], "normed")
    model.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, TOKENS))
    feeds = {"x": normal(5, 2, L, C)}

    graph, report = folded(graph_of(model))

    assert report.changed == ("normed.rescale",)
    for actual, expected in zip(infer(export_model(graph), feeds), infer(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
