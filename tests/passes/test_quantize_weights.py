"""The weights' half of quantization: storage, arithmetic and refusals. Which kernels run: test_check_model.py."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx_graphs import build, graph_of, infer, normal
from scaled_layers import OPS, computed, float_model, float_weight, sample, scaled_layer
from toy_nets import ORT_CPU, layer_recipe, node, recipe_with

from tfmq_export.errors import PostconditionError, PreconditionError, TargetError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.insert_qdq import InsertQdq
from tfmq_export.passes.quantize_weights import QuantizeWeights
from tfmq_export.passes.rescale_inputs import RescaleInputs
from tfmq_export.recipe import LayerRecipe
from tfmq_export.spec import QParams, QuantSpec


def grid(scale: float, zero_point: int, bits: int = 8) -> QParams:
    return QParams(QuantSpec(bits, signed=False), np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


def quantized(model: onnx.ModelProto, *layers: LayerRecipe) -> gs.Graph:
    recipe = recipe_with(layers)
    graph = graph_of(model)
    run_passes(
        graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU), QuantizeWeights(recipe, ORT_CPU)]
    )
    return graph


def conv_model(weight: NDArray, bias: NDArray, size: tuple[int, ...], **attrs: object) -> onnx.ModelProto:
    channels = weight.shape[1] * attrs.get("group", 1)  # type: ignore[operator]
    nodes = [node("Conv", "x w b", "conv2d", **attrs)]
    return build(
        nodes, {"x": ("n", channels, *size)}, {"conv2d": ("n", len(weight), "h", "w")}, {"w": weight, "b": bias}
    )


def linear_model(op: str, weight: NDArray, bias: NDArray) -> onnx.ModelProto:
    if op == "Gemm":
        nodes = [node("Gemm", "x w b", "linear", transB=1)]
        return build(nodes, {"x": ("n", weight.shape[1])}, {"linear": ("n", len(weight))}, {"w": weight, "b": bias})
    nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear")]
    return build(
        nodes, {"x": ("n", 3, weight.shape[1])}, {"linear": ("n", 3, len(weight))}, {"w": weight.T.copy(), "b": bias}
    )


def run(graph: gs.Graph, x: NDArray, *, integer: bool) -> NDArray:
    """The integer kernels do not read every attribute; other engines do, and so do ONNX Runtime's float ones."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "0" if integer else "1")
    session = ort.InferenceSession(export_model(graph).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def codes_of(x: NDArray, params: QParams) -> NDArray[np.int64]:
    codes = np.rint(x / params.scale) + params.zero_point
    return np.clip(codes, params.spec.qmin, params.spec.qmax).astype(np.int64)


def integer_bias(layer: LayerRecipe, bias: NDArray) -> NDArray[np.float64]:
    return np.rint(bias / (layer.input.scale.astype(np.float64) * layer.weight.scale))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    activation_bits=st.sampled_from([6, 8]),
    group=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    zero_share=st.floats(0, 1),
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
)
def test_a_convolution_is_integer_arithmetic_to_one_code(  # noqa: PLR0913
    bits: int,
    activation_bits: int,
    group: int,
    kernel: int,
    stride: int,
    pads: list[int],
    zero_share: float,
    size: tuple[int, int],
) -> None:
    weight, bias = normal(0, 4, 3, kernel, kernel), normal(1, 4)
    x_grid = grid(0.03, round(zero_share * (2**activation_bits - 1)), activation_bits)
    y_grid = grid(0.1, 100)
    layer = layer_recipe("conv2d", "conv", weight, x_grid, y_grid, bits)
    x = normal(2, 2, 3 * group, *size)

    graph = quantized(conv_model(weight, bias, size, group=group, strides=[stride] * 2, pads=pads), layer)

    # Zero padding is the code of zero, so padding after subtracting the zero point is the definition.
    centred = torch.from_numpy(codes_of(x, x_grid) - x_grid.zero_point).double()
    padded = torch.nn.functional.pad(centred, (pads[1], pads[3], pads[0], pads[2]))
    integers = torch.from_numpy(layer.weight_codes).double()
    sums = torch.nn.functional.conv2d(padded, integers, stride=stride, groups=group).numpy()
    channel = (slice(None), None, None)
    real = (sums + integer_bias(layer, bias)[channel]) * (layer.input.scale * layer.weight.scale)[channel]
    for integer in (True, False):
        difference = codes_of(run(graph, x, integer=integer), y_grid) - codes_of(real, y_grid)
        # Kernels multiply by a rounded factor: a tie may fall the other way, but ties are rare.
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) <= 1 + 0.01 * difference.size


def test_border_pixels_see_zeros_whatever_the_zero_point() -> None:
    # One padded pixel row of a constant image: three of nine taps fall outside, five in the corners.
    weight = np.ones((1, 1, 3, 3), np.float32)
    layer = layer_recipe("conv2d", "conv", weight, grid(1.0, 77), grid(1.0, 0))

    graph = quantized(conv_model(weight, np.zeros(1, np.float32), (3, 3), pads=[1] * 4), layer)

    (actual,) = infer(export_model(graph), {"x": np.full((1, 1, 3, 3), 10.0, np.float32)})
    np.testing.assert_array_equal(actual[0, 0], [[40, 60, 40], [60, 90, 60], [40, 60, 40]])


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(["MatMul", "Gemm"]),
    bits=st.sampled_from([4, 8]),
    width=st.integers(1, 9),
    out=st.integers(1, 7),
    zero_point=st.integers(0, 255),
)
def test_a_linear_layer_is_integer_arithmetic(op: str, bits: int, width: int, out: int, zero_point: int) -> None:
    weight, bias = normal(0, out, width), normal(1, out)
    layer = layer_recipe("linear", "linear", weight, grid(0.02, zero_point), bits=bits)
    x = normal(2, 4, width) if op == "Gemm" else normal(2, 4, 3, width)

    graph = quantized(linear_model(op, weight, bias), layer)

    step = layer.input.scale.astype(np.float64) * layer.weight.scale
    sums = (codes_of(x, layer.input) - zero_point) @ layer.weight_codes.T.astype(np.int64)
    expected = sums * step + (integer_bias(layer, bias) * step if op == "Gemm" else bias)
    for integer in (True, False):
        # Integer sums are exact and rounded once or twice; float ones are of at most 9 terms of up to 20.
        np.testing.assert_allclose(run(graph, x, integer=integer), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 5), fan_in=st.integers(1, 3), kernel=st.integers(1, 3), bits=st.sampled_from([2, 3, 4]))
def test_packed_weights_are_the_same_numbers(out: int, fan_in: int, kernel: int, bits: int) -> None:
    weight, bias = normal(0, out, fan_in, kernel, kernel), normal(1, out)
    packed = layer_recipe("conv2d", "conv", weight, grid(0.03, 120), grid(0.1, 100), bits)
    plain = replace(packed, weight=replace(packed.weight, spec=QuantSpec(8, axis=0)))
    model = conv_model(weight, bias, (5, 5))
    graphs = [quantized(model, layer) for layer in (packed, plain)]

    stored = [{item.name: item for item in export_model(graph).graph.initializer} for graph in graphs]
    types = [items["conv2d.weight_codes"].data_type for items in stored]
    assert types == [TensorProto.INT4, TensorProto.INT8]
    assert len(stored[0]["conv2d.weight_codes"].raw_data) == (weight.size + 1) // 2
    x = normal(2, 2, fan_in, 5, 5)
    np.testing.assert_array_equal(*(infer(export_model(graph), {"x": x})[0] for graph in graphs))


def test_learned_integers_are_stored_as_they_are() -> None:
    # AdaRound rounds some weights to the farther integer; rounding again would undo it.
    weight = normal(0, 4, 2, 3, 3)
    layer = layer_recipe("conv2d", "conv", weight, grid(0.03, 0), grid(0.1, 0))
    scaled = weight / layer.weight.scale.reshape(-1, 1, 1, 1)
    farther = np.clip(
        np.where(scaled > layer.weight_codes, layer.weight_codes + 1.0, layer.weight_codes - 1.0), -128, 127
    )
    learned = replace(
        layer, weight_codes=np.where(normal(1, *weight.shape) > 0, farther, layer.weight_codes).astype(np.int8)
    )

    graph = quantized(conv_model(weight, normal(1, 4), (3, 3)), learned)

    (stored,) = [x for x in export_model(graph).graph.initializer if x.name == "conv2d.weight_codes"]
    np.testing.assert_array_equal(numpy_helper.to_array(stored), learned.weight_codes)


def test_the_bias_lies_on_the_accumulators_grid() -> None:
    weight, bias = normal(0, 4, 2, 1, 1), normal(1, 4)
    layer = layer_recipe("conv2d", "conv", weight, grid(0.03, 0), grid(0.1, 0))

    graph = quantized(conv_model(weight, bias, (3, 3)), layer)

    stored = {item.name: numpy_helper.to_array(item) for item in export_model(graph).graph.initializer}
    step = stored["conv2d.bias_scale"]
    assert stored["conv2d.bias_codes"].dtype == np.int32
    np.testing.assert_array_equal(step, layer.input.scale * layer.weight.scale)
    assert (np.abs(stored["conv2d.bias_codes"] * step - bias) <= step * 0.5001).all()  # half a step, in fp32


def bound_graph(layer: LayerRecipe, weight: NDArray, bias: NDArray | None = None) -> tuple[gs.Graph, QuantizeWeights]:
    recipe = recipe_with([layer])
    graph = graph_of(conv_model(weight, np.zeros(len(weight), np.float32) if bias is None else bias, (3, 3)))
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU)])
    return graph, QuantizeWeights(recipe, ORT_CPU)


WEIGHT = normal(0, 4, 2, 1, 1)
LAYER = layer_recipe("conv2d", "conv", WEIGHT, grid(0.03, 0), grid(0.1, 0))


def test_integers_of_another_weight_are_refused() -> None:
    graph, rewrite = bound_graph(LAYER, normal(5, *WEIGHT.shape))

    with pytest.raises(
        PostconditionError, match=r"net.conv2d: the recipe's integers are not a rounding of this weight"
    ):
        run_passes(graph, [rewrite])


def test_a_weight_two_steps_from_its_integer_is_refused() -> None:
    moved = WEIGHT.copy()
    moved[1, 1] += 2.0 * LAYER.weight.scale[1] * -np.sign(moved[1, 1])
    graph, rewrite = bound_graph(LAYER, moved)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        run_passes(graph, [rewrite])


def test_a_weight_beyond_the_grid_may_lie_at_its_end() -> None:
    shrunk = replace(LAYER.weight, scale=LAYER.weight.scale / 2)
    ends = np.clip(np.round(WEIGHT / shrunk.scale.reshape(-1, 1, 1, 1)), -128, 127).astype(np.int8)

    graph, rewrite = bound_graph(replace(LAYER, weight=shrunk, weight_codes=ends), WEIGHT)

    assert (np.abs(ends) >= 127).any()
    (report,) = run_passes(graph, [rewrite])
    assert report.changed == ("net.conv2d",)


def test_an_integer_at_the_end_excuses_no_weight_inside_the_grid() -> None:
    ends = replace(LAYER, weight_codes=np.full_like(LAYER.weight_codes, 127))
    graph, rewrite = bound_graph(ends, WEIGHT)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        run_passes(graph, [rewrite])


def test_integers_of_another_shape_are_refused() -> None:
    graph, rewrite = bound_graph(LAYER, normal(0, 4, 1, 1, 1))

    with pytest.raises(PreconditionError, match=r"the graph's weight is \(4, 1, 1, 1\), the recipe's \(4, 2, 1, 1\)"):
        run_passes(graph, [rewrite])


def test_a_missing_node_is_refused() -> None:
    graph, rewrite = bound_graph(LAYER, WEIGHT)
    next(item for item in graph.nodes if item.op == "Conv").name = "other"

    with pytest.raises(PreconditionError, match=r"net.conv2d: no node node_conv2d; run BindRecipe first"):
        run_passes(graph, [rewrite])


def test_second_run_is_refused() -> None:
    graph, rewrite = bound_graph(LAYER, WEIGHT)
    run_passes(graph, [rewrite])

    with pytest.raises(PreconditionError, match=r"net.conv2d: its weight conv2d.weight_dequantized is not a constant"):
        run_passes(graph, [rewrite])


def test_a_bias_that_overflows_the_accumulator_is_refused() -> None:
    step = float(LAYER.input.scale * LAYER.weight.scale[0])
    largest = np.float32([step * 2**31 * 0.999, 0, 0, 0])
    graph, rewrite = bound_graph(LAYER, WEIGHT, largest)
    run_passes(graph, [rewrite])

    graph, rewrite = bound_graph(LAYER, WEIGHT, largest * np.float32(1.01))
    with pytest.raises(PreconditionError, match=r"net.conv2d: its bias does not fit 32 bits at the weight's scale"):
        run_passes(graph, [rewrite])


def test_a_computed_bias_is_refused() -> None:
    graph, rewrite = bound_graph(LAYER, WEIGHT)
    conv = next(item for item in graph.nodes if item.op == "Conv")
    computed = gs.Variable("computed", np.float32, (4,))
    graph.nodes.insert(0, gs.Node("Relu", "relu", inputs=[conv.inputs[2]], outputs=[computed]))
    conv.inputs[2] = computed

    with pytest.raises(PreconditionError, match=r"net.conv2d: its bias computed is not a constant"):
        run_passes(graph, [rewrite])


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
        actual = run(graph, x, integer=integer)
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

    error = np.linalg.norm(run(graph, x, integer=True) - expected) / np.linalg.norm(expected)
    assert error < 0.35  # 4-bit weights by plain rounding; a factor forgotten or applied twice is off by more than 1


def tau_twice(graph: gs.Graph) -> None:
    (rescale,) = [item for item in graph.nodes if item.op == "Mul" and item.name.endswith(".rescale")]
    factor = rescale.inputs[1]
    factor.values = (factor.values / TAU.reshape(factor.values.shape)).astype(np.float32)


def no_rescale(graph: gs.Graph) -> None:
    (rescale,) = [item for item in graph.nodes if item.op == "Mul" and item.name.endswith(".rescale")]
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
    codes = stored[f"{layer.name}.weight_codes"]
    assert codes.data_type == TensorProto.INT4
    step = numpy_helper.to_array(stored[f"{layer.name}.weight_scale"])
    np.testing.assert_array_equal(step, layer.weight.scale / np.float32(8))  # 2^(min d)


@pytest.mark.parametrize("op", ["Conv", "grouped Conv"])
def test_exponents_on_eight_bit_convolutions_are_refused_where_outputs_have_grids(op: str) -> None:
    with pytest.raises(TargetError, match=r"its 8-bit weight shifted by PTS does not fit 8 bits, and the sum over its"):
        scaled(op, "pts", bits=8)


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Gemm transposed"])
def test_exponents_on_eight_bit_linear_layers_have_to_be_split_first(op: str) -> None:
    with pytest.raises(PreconditionError, match=r"net.linear: its integers have to be split first; run SplitExponents"):
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

    y = run(graph, np.float32([2, 3]).reshape(1, 2, 1, 1), integer=True)

    assert y.item() == 200 - 64 * 2 + 3


def test_integers_of_the_unscaled_weight_are_refused() -> None:
    layer, _, bias = scaled("Conv", "les")
    model = float_model("Conv", float_weight("Conv"), bias)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        quantized(model, replace(layer, les_scale=None))
    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        quantized(model, replace(layer, les_scale=TAU[::-1].copy()))
