"""Weights under equivalent and power-of-two scaling: what the recipe says is what is computed, or it is refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import infer, normal
from nets.scaled_layers import OPS, computed, float_model, float_weight, sample, scaled_layer
from nets.single_layers import codes_of, conv_model, grid, quantized
from nets.toy_recipes import layer_recipe
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tfmq_export.errors import PostconditionError, TargetError
from tfmq_export.passes.graph import export_model
from tfmq_export.recipe.names import RESCALE, weight_codes_name
from tfmq_export.recipe.recipe import LayerRecipe

TAU = np.float32([0.5, 3.1, 0.27, 1.9])
EXPONENT = np.int8([0, -3, -1, 0])
SCALINGS = {"les": (TAU, None), "pts": (None, EXPONENT), "les and pts": (TAU, EXPONENT)}
SCALED_INPUT, SCALED_OUTPUT = grid(0.08, 120), grid(0.3, 128)


def scaled(op: str, scaling: str, bits: int = 4) -> tuple[LayerRecipe, gs.Graph, NDArray]:
    tau, exponent = SCALINGS[scaling]
    layer = scaled_layer(op, SCALED_INPUT, SCALED_OUTPUT if "Conv" in op else None, bits, tau, exponent)
    bias = normal(1, len(layer.weight_codes))
    return layer, quantized(float_model(op, float_weight(op), bias), layer), bias


def assert_computes_the_recipe(op: str, layer: LayerRecipe, graph: gs.Graph, bias: NDArray) -> None:
    """The formula of ``LayerRecipe``, in integer kernels and in float ones."""
    x = sample(op)
    expected = computed(op, layer, bias, x)
    for integer in (True, False):
        actual = infer(graph, {"x": x}, integer=integer)[0]
        if layer.output is None:
            # Sums of 4 products of fp32 numbers of up to 20.
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
            continue
        difference = codes_of(actual, layer.output) - codes_of(expected, layer.output)
        # Kernels multiply by a rounded factor: a tie may fall the other way, but ties are rare.
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) <= 1 + 0.01 * difference.size


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("op", OPS)
def test_scaled_layers_compute_what_the_recipe_says(op: str, scaling: str) -> None:
    layer, graph, bias = scaled(op, scaling)

    assert_computes_the_recipe(op, layer, graph, bias)


@pytest.mark.parametrize("op", OPS)
def test_scaling_alone_needs_no_narrow_weights(op: str) -> None:
    layer, graph, bias = scaled(op, "les", bits=8)

    assert_computes_the_recipe(op, layer, graph, bias)


@pytest.mark.parametrize("scaling", ["les", "les and pts"])
@pytest.mark.parametrize("op", OPS)
def test_a_scaled_layer_is_near_the_float_layer(op: str, scaling: str) -> None:
    _, graph, bias = scaled(op, scaling)
    x = sample(op) * np.float32(0.2)  # inside the grid, whatever the exponents

    (expected,) = infer(float_model(op, float_weight(op), bias), {"x": x})

    error = np.linalg.norm(infer(graph, {"x": x})[0] - expected) / np.linalg.norm(expected)
    assert error < 0.35  # 4-bit weights by plain rounding; a factor forgotten or applied twice is off by more than 1


def tau_twice(graph: gs.Graph) -> None:
    (rescale,) = [item for item in graph.nodes if item.op == "Mul" and item.name.endswith(RESCALE)]
    factor = rescale.inputs[1]
    factor.values = (factor.values / TAU.reshape(factor.values.shape)).astype(np.float32)


def no_rescale(graph: gs.Graph) -> None:
    (rescale,) = [item for item in graph.nodes if item.op == "Mul" and item.name.endswith(RESCALE)]
    rescale.inputs[1].values = np.ones_like(rescale.inputs[1].values)


def no_shift(graph: gs.Graph) -> None:
    (shift,) = [value for name, value in graph.tensors().items() if name.endswith(".weight_shift")]
    shift.values = np.ones_like(shift.values)


def shift_of_the_wrong_channels(graph: gs.Graph) -> None:
    (shift,) = [value for name, value in graph.tensors().items() if name.endswith(".weight_shift")]
    axis = 0 if shift.values.shape[-1] == 1 and shift.values.ndim == 2 else 1
    shift.values = np.flip(shift.values, axis).copy()


@pytest.mark.parametrize("spoil", [tau_twice, no_rescale, no_shift, shift_of_the_wrong_channels])
@pytest.mark.parametrize("op", OPS)
def test_the_identity_of_scaling_can_fail(op: str, spoil: Callable[[gs.Graph], None]) -> None:
    layer, graph, bias = scaled(op, "les and pts")

    spoil(graph)

    with pytest.raises(AssertionError):
        assert_computes_the_recipe(op, layer, graph, bias)


@pytest.mark.parametrize("op", OPS)
def test_shifted_weights_stay_packed_in_four_bits(op: str) -> None:
    layer, graph, _ = scaled(op, "pts")

    stored = {item.name: item for item in export_model(graph).graph.initializer}
    codes = stored[weight_codes_name(layer.name)]
    assert codes.data_type == TensorProto.INT4
    step = numpy_helper.to_array(stored[f"{layer.name}.weight_scale"])
    np.testing.assert_array_equal(step, layer.weight.scale / np.float32(8))  # 2^(min d)


@pytest.mark.parametrize("op", ["Conv", "grouped Conv", "MatMul", "Gemm", "Gemm transposed"])
def test_exponents_on_eight_bit_weights_are_refused(op: str) -> None:
    with pytest.raises(TargetError, match=r"its 8-bit weight shifted by PTS does not fit 8 bits; use 4-bit weights"):
        scaled(op, "pts", bits=8)


def shifted_pixel(code: int) -> LayerRecipe:
    """One weight times 2, beside one that stays."""
    layer = layer_recipe("conv2d", "conv", np.ones((1, 2, 1, 1)), grid(1.0, 0), grid(1.0, 0))
    layer = replace(layer, weight_codes=np.int8([code, 1]).reshape(1, 2, 1, 1))
    return replace(layer, weight=replace(layer.weight, scale=np.float32([1])), pts_exponent=np.int8([0, -1]))


def test_an_integer_shifted_to_just_above_the_container_is_refused() -> None:
    # 64 * 2 = 128, which int8 would wrap to -128.
    layer = shifted_pixel(64)
    weight = layer.weight_codes.astype(np.float32)

    with pytest.raises(TargetError, match="does not fit 8 bits"):
        quantized(conv_model(weight, np.zeros(1, np.float32), (3, 3)), layer)


def test_an_integer_shifted_to_the_end_of_the_container_stays() -> None:
    layer = shifted_pixel(-64)  # -64 * 2 = -128 is an int8
    weight = layer.weight_codes.astype(np.float32)
    graph = quantized(conv_model(weight, np.float32([200]), (1, 1)), layer)

    y = infer(graph, {"x": np.float32([2, 3]).reshape(1, 2, 1, 1)})[0]

    assert y.item() == 200 - 64 * 2 + 3


def test_integers_of_the_unscaled_weight_are_refused() -> None:
    layer, _, bias = scaled("Conv", "les")
    model = float_model("Conv", float_weight("Conv"), bias)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        quantized(model, replace(layer, les_scale=None))
    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        quantized(model, replace(layer, les_scale=TAU[::-1].copy()))
