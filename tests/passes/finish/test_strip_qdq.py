"""The float twin: dequantized weights, and no trace of what only integers need."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.gated_nets import gated_net
from nets.map_nets import map_net
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import OPS, float_model, float_weight, per_weight, sample, scaled_layer
from nets.toy_nets import Net, conv_net, node, token_net
from nets.toy_recipes import ORT_CPU, layer_recipe, per_channel, recipe_for, recipe_with, with_products
from numpy.typing import NDArray
from onnx import TensorProto

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.qdq.stack_output_codes import StackOutputCodes
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target, find_target

TAU = np.float32([0.5, 3.1, 0.27, 1.9])
EXPONENT = np.int8([0, -3, -1, 0])
SCALINGS = {
    "plain": (None, None),
    "les": (TAU, None),
    "pts": (None, EXPONENT),
    "les and pts": (TAU, EXPONENT),
}
ONLY_INTEGERS_NEED = {"QuantizeLinear", "DequantizeLinear", "Clip", "Cast", "Mul", "Split", "Sum"}


def grid(scale: float, zero_point: int, bits: int = 8, codes: int = 1) -> QParams:
    spec = QuantSpec(bits, signed=False, codes=codes)
    return QParams(spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


def stripped(graph: gs.Graph, *layers: LayerRecipe) -> gs.Graph:
    recipe = recipe_with(layers)
    run_passes(
        graph,
        [
            BindRecipe(recipe),
            RescaleInputs(recipe),
            InsertQdq(recipe, ORT_CPU),
            QuantizeWeights(recipe, ORT_CPU),
            StackOutputCodes(recipe),
        ],
    )
    assert "DequantizeLinear" in ops(graph)
    run_passes(graph, [StripQdq()])
    return graph


def dequantized(layer: LayerRecipe) -> NDArray[np.float64]:
    """The integers of ``tau W`` as real numbers."""
    return layer.weight_codes * per_channel(layer.weight.scale.astype(np.float64), layer.weight_codes.ndim)


def twin(net: Net, target: Target) -> gs.Graph:
    recipe, graph = adapt(with_products(recipe_for(net), net), target), graph_of(net.model)
    run_passes(graph, [*passes_for(recipe, target, sample="sample", timestep="timestep"), StripQdq()])
    return graph


@pytest.mark.parametrize("make", [conv_net, token_net, gated_net, map_net])
def test_the_forms_of_a_target_leave_its_twin_as_it_is(make: Callable[[], Net]) -> None:
    net, openvino = make(), find_target("openvino")
    plain = replace(
        openvino,
        zero_points=True,
        split_results=False,
        channels_last=False,
        turned_factors=False,
        polynomial_tanh=False,
    )
    own, portable = twin(net, openvino), twin(net, plain)

    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        feeds["timestep"] = feeds["timestep"].reshape(-1)
        (actual,), (expected,) = infer(own, feeds), infer(portable, feeds)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assert_near(actual: NDArray, expected: NDArray, layer: LayerRecipe) -> None:
    """fp32 rounding, and half a step of the accumulator for each rounding of the bias."""
    step = float((layer.input.scale * layer.weight.scale).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1.01 * step + 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("op", OPS)
def test_the_twin_is_the_network_of_dequantized_weights(op: str, scaling: str) -> None:
    tau, exponent = SCALINGS[scaling]
    output = grid(0.3, 128) if "Conv" in op else None
    layer = scaled_layer(op, grid(0.01, 120), output, 4, tau, exponent)
    weight, bias = float_weight(op), normal(1, len(layer.weight_codes))

    twin = stripped(graph_of(float_model(op, weight, bias)), layer)

    real = dequantized(layer)
    real = real if tau is None else real / per_weight(op, tau.astype(np.float64), real)
    x = sample(op)
    (expected,) = infer(float_model(op, real.astype(np.float32), bias), {"x": x})
    assert_near(infer(export_model(twin), {"x": x})[0], expected, layer)
    assert not ONLY_INTEGERS_NEED & set(ops(twin))
    # Rounded weights are other weights: the check above would see the float network.
    assert np.abs(infer(float_model(op, weight, bias), {"x": x})[0] - expected).max() > 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_scaled_and_stacked_layers_strip_together(bias: bool) -> None:
    enter = scaled_layer("Conv", grid(0.01, 120), grid(0.3, 0), 4, TAU, EXPONENT)
    leave = layer_recipe("conv2d_1", "conv", normal(5, 3, 6, 1, 1), grid(0.3, 0), grid(0.05, 500, codes=4))
    weights = {"w": float_weight("Conv"), "w1": normal(5, 3, 6, 1, 1)}
    biases = {"b": normal(1, 6), "b1": normal(2, 3)} if bias else {}
    nodes = [
        node("Conv", "x w b" if bias else "x w", "conv2d", pads=[1] * 4),
        node("Relu", "conv2d", "relu"),
        node("Conv", "relu w1 b1" if bias else "relu w1", "conv2d_1"),
    ]
    inputs, outputs = {"x": ("n", 4, 5, 5)}, {"conv2d_1": ("n", 3, 5, 5)}

    twin = stripped(graph_of(build(nodes, inputs, outputs, weights | biases)), enter, leave)

    real = {"w": dequantized(enter) / TAU.astype(np.float64).reshape(1, -1, 1, 1), "w1": dequantized(leave)}
    real = {name: values.astype(np.float32) for name, values in real.items()}
    x = sample("Conv")
    (expected,) = infer(build(nodes, inputs, outputs, real | biases), {"x": x})
    (actual,) = infer(export_model(twin), {"x": x})
    # The rounded bias of the first layer passes through weights of at most 3, six of them.
    steps = 18 * float((enter.input.scale * enter.weight.scale).max()) + float(
        (leave.input.scale * leave.weight.scale).max()
    )
    assert steps < 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=steps + 1e-5 * np.abs(expected).max())
    assert ops(twin) == ["Conv", "Relu", "Conv"]


def test_layers_that_share_a_scaled_input_each_get_their_factor_back() -> None:
    weights = {name: normal(seed, 5, 4) for seed, name in enumerate(("linear", "linear_1"))}
    layers = []
    for name, weight in weights.items():
        layer = layer_recipe(name, "linear", weight * TAU, grid(0.01, 120))
        layers.append(replace(layer, les_scale=TAU))
    nodes = [
        node("MatMul", "x w", "linear"),
        node("MatMul", "x w1", "linear_1"),
        node("Sub", "linear linear_1", "y"),
    ]
    constants = {"w": weights["linear"].T.copy(), "w1": weights["linear_1"].T.copy()}

    twin = stripped(graph_of(build(nodes, {"x": (2, 4)}, {"y": (2, 5)}, constants)), *layers)

    x = normal(3, 2, 4)
    expected = x @ ((dequantized(layers[0]) - dequantized(layers[1])) / TAU).T
    np.testing.assert_allclose(infer(export_model(twin), {"x": x})[0], expected, rtol=0, atol=1e-5)  # 8 fp32 terms
    assert sorted(ops(twin)) == ["MatMul", "MatMul", "Sub"]


def test_codes_that_a_prologue_passes_stay_codes() -> None:
    grid = [np.float32(0.1), np.uint8(3)]
    nodes = [node("DequantizeLinear", "x s z", "real"), node("Relu", "real", "y")]
    model = build(nodes, {"x": ("n", 2)}, {"y": ("n", 2)}, {"s": np.asarray(grid[0]), "z": np.asarray(grid[1])})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    graph = graph_of(model)

    run_passes(graph, [StripQdq()])

    codes = np.array([[0, 9]], np.uint8)
    np.testing.assert_allclose(infer(export_model(graph), {"x": codes})[0], [[0, 0.6]], rtol=1e-6)
