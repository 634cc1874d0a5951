"""The weights' half of quantization: storage, arithmetic and refusals. Which kernels run: test_check_model.py."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.single_layers import codes_of, conv_model, grid, quantized
from nets.toy_nets import node
from nets.toy_recipes import ORT_CPU, layer_recipe, recipe_with
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.ptq.error_feedback import feedback_codes
from tfmq_export.ptq.pairs import Pairs
from tfmq_export.ptq.weights import nearest_codes, search_weight_scale
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import WEIGHT_REACH, LayerRecipe


def linear_model(op: str, weight: NDArray, bias: NDArray) -> onnx.ModelProto:
    if op == "Gemm":
        nodes = [node("Gemm", "x w b", "linear", transB=1)]
        return build(nodes, {"x": ("n", weight.shape[1])}, {"linear": ("n", len(weight))}, {"w": weight, "b": bias})
    nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear")]
    return build(
        nodes, {"x": ("n", 3, weight.shape[1])}, {"linear": ("n", 3, len(weight))}, {"w": weight.T.copy(), "b": bias}
    )


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
        difference = codes_of(infer(graph, {"x": x}, integer=integer)[0], y_grid) - codes_of(real, y_grid)
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
        np.testing.assert_allclose(infer(graph, {"x": x}, integer=integer)[0], expected, rtol=1e-5, atol=1e-4)


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


def test_a_weight_three_steps_from_its_integer_is_refused() -> None:
    moved = WEIGHT.copy()
    moved[1, 1] += 3.0 * LAYER.weight.scale[1] * -np.sign(moved[1, 1])
    graph, rewrite = bound_graph(LAYER, moved)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        run_passes(graph, [rewrite])


@pytest.mark.parametrize("code", [-127, -100, -7, 6, 99, 125])
def test_a_weight_on_the_grid_may_be_rounded_two_integers_away(code: int) -> None:
    # Error feedback does; in float32 that is some last bits more or less than two steps.
    scale = np.linspace(0.01, 0.02, 50, dtype=np.float32)
    weight = np.nextafter(scale * np.float32(code), np.float32(-np.inf)).reshape(-1, 1, 1, 1).repeat(2, 1)
    codes = np.full(weight.shape, code + WEIGHT_REACH, np.int8)
    zero_points = np.zeros(len(scale), np.int32)
    layer = layer_recipe("conv2d", "conv", weight, grid(0.03, 0), grid(0.1, 0))
    layer = replace(layer, weight=replace(layer.weight, scale=scale, zero_point=zero_points), weight_codes=codes)

    graph, rewrite = bound_graph(layer, weight)

    assert (weight < scale.reshape(-1, 1, 1, 1) * code).all()
    (report,) = run_passes(graph, [rewrite])
    assert report.changed == ("net.conv2d",)


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


def with_pairs(weight: NDArray, scale: NDArray, codes: NDArray) -> LayerRecipe:
    """A layer of these integers, on a grid whose pairs add up to 128 at most."""
    plain = layer_recipe("conv2d", "conv", weight, grid(0.03, 0), grid(0.1, 0))
    held = QParams(QuantSpec(8, axis=0, pair_sum=128), scale.astype(np.float32), np.zeros(len(scale), np.int32))
    return replace(plain, weight=held, weight_codes=codes.astype(np.int8))


# Channels 2j and 2j + 1 are a pair: in steps of the grid, and the integers that such pairs may get.
WANTED = np.float32([[100, 90, -3, 7], [-150, -20, 110, 40], [127, 1, -128, -60], [120, -120, 5, 5]])
HELD = np.int8([[69, 59, -3, 7], [-128, 0, 99, 29], [127, 1, -98, -30], [120, -120, 5, 5]])
STEP = np.float32([0.01, 0.02, 0.03, 0.04])
PAIRED = (WANTED * STEP[:, None]).reshape(4, 4, 1, 1)


@pytest.mark.parametrize("moved", [np.int8([0, 0, 0, 0]), np.int8([2, -2, 2, -2])])
def test_a_pair_that_was_too_large_may_have_given_up_what_it_had_too_much(moved: NDArray[np.int8]) -> None:
    codes = HELD.copy()
    codes[[0, 3]] += moved
    layer = with_pairs(PAIRED, STEP, codes.reshape(PAIRED.shape))

    graph, rewrite = bound_graph(layer, PAIRED)

    assert (np.abs(WANTED - codes) > 30).any()
    (report,) = run_passes(graph, [rewrite])
    assert report.changed == ("net.conv2d",)


def test_without_pairs_no_weight_gives_anything_up() -> None:
    held = with_pairs(PAIRED, STEP, HELD.reshape(PAIRED.shape))
    free = replace(held, weight=replace(held.weight, spec=QuantSpec(8, axis=0)))
    graph, rewrite = bound_graph(free, PAIRED)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        run_passes(graph, [rewrite])


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 3), (3, 0)])
def test_an_integer_three_steps_from_what_its_pair_may_hold_is_refused(place: tuple[int, int]) -> None:
    codes = HELD.copy()
    codes[place] -= 3 * np.sign(WANTED[place]).astype(np.int8)  # so that the pair is kept
    graph, rewrite = bound_graph(with_pairs(PAIRED, STEP, codes.reshape(PAIRED.shape)), PAIRED)

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        run_passes(graph, [rewrite])


@pytest.mark.parametrize("factor", [-1.0, 0.9])
def test_a_grid_with_pairs_knows_another_models_weight(factor: float) -> None:
    layer = with_pairs(PAIRED, STEP, HELD.reshape(PAIRED.shape))
    for other in (PAIRED * np.float32(factor), normal(5, *PAIRED.shape), PAIRED[:, [0, 2, 1, 3]]):
        graph, rewrite = bound_graph(layer, other)

        with pytest.raises(PostconditionError, match="not a rounding of this weight"):
            run_passes(graph, [rewrite])


PAIR_LAYERS = [(8, 6, 3, 3), (8, 5, 3, 3), (8, 6, 1, 1), (8, 5, 1, 1)]


@pytest.mark.parametrize("tightness", [1.0, 0.5])
@pytest.mark.parametrize("shape", PAIR_LAYERS)
def test_the_integers_that_are_chosen_with_pairs_are_known_again(shape: tuple[int, ...], tightness: float) -> None:
    weight, spec = torch.from_numpy(normal(0, *shape)), QuantSpec(8, axis=0, pair_sum=128)
    pairs = Pairs.of(weight, 1, 1)
    scale = tightness * search_weight_scale(weight, spec, pairs=pairs)
    x = torch.from_numpy(normal(1, 200, weight[0].numel()))
    nearest = nearest_codes(weight, scale, spec, pairs)
    fed_back = feedback_codes(weight, scale, spec, [(x.T @ x)[None]], pairs)

    for codes in (nearest, fed_back):
        graph, rewrite = bound_graph(with_pairs(weight.numpy(), scale.numpy(), codes.numpy()), weight.numpy())

        (report,) = run_passes(graph, [rewrite])
        assert report.changed == ("net.conv2d",)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_weight_beyond_the_grid_may_leave_its_end_to_its_neighbour(sign: float) -> None:
    # What the third weight loses, the second makes up for with 2; of their 128 that leaves 126, one less than the end.
    weight, pairs = torch.tensor([[128.28, 0.1, 40.45, 0.0]]) * sign, Pairs(torch.tensor([1, 0, 3, 2]))
    third = torch.from_numpy(normal(0, 200))
    x = torch.from_numpy(normal(1, 200, 4)) * 0.1
    x[:, 1] += third
    x[:, 2] = 20 * third
    spec = QuantSpec(8, axis=0, pair_sum=128)

    codes = feedback_codes(weight, torch.ones(1), spec, [(x.T @ x)[None]], pairs)

    assert codes[0, :2].tolist() == [126 * sign, 2 * sign]
    weight, codes = (each.numpy().reshape(1, 4, 1, 1) for each in (weight, codes))
    graph, rewrite = bound_graph(with_pairs(weight, np.ones(1), codes), weight)
    (report,) = run_passes(graph, [rewrite])
    assert report.changed == ("net.conv2d",)


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
    with pytest.raises(PreconditionError, match=r"net.conv2d: its bias does not fit 32 bits .* or keep the layer"):
        run_passes(graph, [rewrite])


def test_a_computed_bias_is_refused() -> None:
    graph, rewrite = bound_graph(LAYER, WEIGHT)
    conv = next(item for item in graph.nodes if item.op == "Conv")
    computed = gs.Variable("computed", np.float32, (4,))
    graph.nodes.insert(0, gs.Node("Relu", "relu", inputs=[conv.inputs[2]], outputs=[computed]))
    conv.inputs[2] = computed

    with pytest.raises(PreconditionError, match=r"net.conv2d: its bias computed is not a constant"):
        run_passes(graph, [rewrite])
