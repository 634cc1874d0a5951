"""Equivalent and power-of-two scaling of inputs, as an identity of the float graph."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import CHANNELS, OPS, float_model, float_weight, name_of, on_channels, sample, scaled_layer
from nets.toy_nets import node
from nets.toy_recipes import activation_grid, layer_recipe, recipe_with
from numpy.typing import NDArray

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import LayerRecipe

TAU = np.float32([0.5, 2.0, 0.25, 4.0])
EXPONENT = np.int8([0, -1, -2, -3])
GRID = activation_grid(np.float32([-4, 4]))


def rescaled(model: onnx.ModelProto, *layers: LayerRecipe) -> gs.Graph:
    recipe, graph = recipe_with(layers), graph_of(model)
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe)])
    return graph


taus = st.lists(st.floats(0.05, 20), min_size=CHANNELS, max_size=CHANNELS)
exponents = st.lists(st.integers(-4, 0), min_size=CHANNELS, max_size=CHANNELS)


@settings(max_examples=40, deadline=None)
@given(op=st.sampled_from(OPS), tau=st.none() | taus, exponent=st.none() | exponents)
def test_the_layer_computes_the_same(op: str, tau: list[float] | None, exponent: list[int] | None) -> None:
    own = None if tau is None else np.float32(tau), None if exponent is None else np.int8(exponent)
    layer = scaled_layer(op, GRID, None, 8, *own)
    model = float_model(op, float_weight(op), normal(1, len(layer.weight_codes)))

    graph = rescaled(model, layer)

    x = sample(op)
    (expected,) = infer(model, {"x": x})
    # Factors of up to 320 cancel; at most 36 terms in fp32.
    np.testing.assert_allclose(infer(export_model(graph), {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
    assert ("Mul" in ops(graph)) is (tau is not None or exponent is not None)


@pytest.mark.parametrize("op", OPS)
def test_what_the_layer_reads_is_divided_channel_by_channel(op: str) -> None:
    layer = scaled_layer(op, GRID, None, 4, TAU, EXPONENT)
    graph = rescaled(float_model(op, float_weight(op), normal(1, len(layer.weight_codes))), layer)
    (multiplier,) = [item for item in graph.nodes if item.name == node_name(name_of(op))]
    graph.outputs = [multiplier.inputs[0]]

    x = sample(op)

    expected = x * on_channels(op, 1 / (TAU * np.exp2(EXPONENT.astype(np.float32))))
    np.testing.assert_array_equal(infer(export_model(graph.cleanup()), {"x": x})[0], expected)


def two_readers() -> onnx.ModelProto:
    weights = {"w": np.eye(4, dtype=np.float32), "w1": 2 * np.eye(4, dtype=np.float32)}
    nodes = [node("MatMul", "x w", "linear"), node("MatMul", "x w1", "linear_1"), node("Sub", "linear linear_1", "y")]
    return build(nodes, {"x": (2, 4)}, {"y": (2, 4)}, weights)


def unit_layer(name: str, tau: NDArray | None) -> LayerRecipe:
    layer = layer_recipe(name, "linear", np.eye(4, dtype=np.float32), GRID)
    return replace(layer, les_scale=tau)


def test_layers_with_one_scaling_share_the_node() -> None:
    graph = rescaled(two_readers(), unit_layer("linear", TAU), unit_layer("linear_1", TAU.copy()))

    assert ops(graph).count("Mul") == 1


@pytest.mark.parametrize("other", [None, TAU[::-1].copy()])
def test_layers_with_other_scalings_do_not(other: NDArray | None) -> None:
    graph = rescaled(two_readers(), unit_layer("linear", TAU), unit_layer("linear_1", other))
    x = normal(0, 2, 4)

    assert ops(graph).count("Mul") == (1 if other is None else 2)
    np.testing.assert_allclose(infer(export_model(graph), {"x": x})[0], -x, rtol=1e-6)  # x - 2 x
    assert len({item.name for item in graph.nodes}) == len(graph.nodes)


def test_a_shared_weight_is_scaled_for_its_layer_alone() -> None:
    model = two_readers()
    model.graph.node[1].input[1] = "w"

    graph = rescaled(model, unit_layer("linear", TAU), unit_layer("linear_1", None))

    x = normal(0, 2, 4)
    np.testing.assert_allclose(infer(export_model(graph), {"x": x})[0], np.zeros((2, 4)), atol=1e-6)


def relu_model() -> onnx.ModelProto:
    nodes = [node("Relu", "x", "relu"), node("MatMul", "relu w", "linear")]
    return build(nodes, {"x": (2, 4)}, {"linear": (2, 4)}, {"w": np.eye(4, dtype=np.float32)})


def test_a_relu_goes_behind_the_factor() -> None:
    graph = rescaled(relu_model(), unit_layer("linear", TAU))
    x = normal(0, 2, 4)

    assert ops(graph) == ["Mul", "Relu", "MatMul"]
    np.testing.assert_allclose(infer(export_model(graph), {"x": x})[0], np.maximum(x, 0), rtol=1e-6)


@pytest.mark.parametrize("model", [two_readers, relu_model])
def test_a_second_run_is_refused(model: Callable[[], onnx.ModelProto]) -> None:
    layer = unit_layer("linear", TAU)
    graph = rescaled(model(), layer)

    with pytest.raises(PreconditionError, match=r"net.linear: its input is scaled already"):
        run_passes(graph, [RescaleInputs(recipe_with([layer]))])


def test_a_computed_weight_is_refused() -> None:
    nodes = [node("Relu", "w", "computed"), node("MatMul", "x computed", "linear")]
    model = build(nodes, {"x": (2, 4)}, {"linear": (2, 4)}, {"w": np.eye(4, dtype=np.float32)})
    graph = graph_of(model)

    with pytest.raises(PreconditionError, match=r"net.linear: its weight computed is not a constant"):
        run_passes(graph, [RescaleInputs(recipe_with([unit_layer("linear", TAU)]))])
