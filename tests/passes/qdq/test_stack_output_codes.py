"""``clip(round(y / s), 0, 255 K)`` out of K outputs of 8 bits, through ONNX Runtime."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.toy_nets import node
from nets.toy_recipes import ORT_CPU, layer_recipe, recipe_with
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.qdq.stack_output_codes import StackOutputCodes, staggered_bias
from tfmq_export.passes.scaling.fold_rescales import FoldRescales
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe
from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.target import find_target

INPUT = QParams(QuantSpec(8, signed=False), np.asarray(0.03, np.float32), np.asarray(120, np.int32))
SIZE = (8, 8)


def output_grid(scale: float, zero_point: int, codes: int) -> QParams:
    spec = QuantSpec(8, signed=False, codes=codes)
    return QParams(spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


FOUR_CODES = output_grid(0.05, 500, 4)


def stacked_layer(output: QParams, bits: int = 8, out: int = 3) -> LayerRecipe:
    return layer_recipe("conv2d", "conv", normal(0, out, 4, 3, 3), INPUT, output, bits)


def float_graph(layer: LayerRecipe, bias: NDArray | None) -> gs.Graph:
    out, channels = layer.weight_codes.shape[:2]
    weight = normal(0, *layer.weight_codes.shape)
    nodes = [node("Conv", "x w" if bias is None else "x w b", "conv2d", pads=[1] * 4)]
    constants = {"w": weight} if bias is None else {"w": weight, "b": bias}
    return graph_of(build(nodes, {"x": ("n", channels, *SIZE)}, {"conv2d": ("n", out, *SIZE)}, constants))


def before_stacking(recipe: QuantRecipe, bias: NDArray | None) -> gs.Graph:
    graph = float_graph(recipe.layers[0], bias)
    run_passes(
        graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU), QuantizeWeights(recipe, ORT_CPU)]
    )
    return graph


def stacked(layer: LayerRecipe, bias: NDArray | None) -> gs.Graph:
    recipe = recipe_with([layer])
    graph = before_stacking(recipe, bias)
    run_passes(graph, [StackOutputCodes(recipe)])
    return graph


def accumulated(layer: LayerRecipe, bias: NDArray | None, x: NDArray) -> NDArray[np.float64]:
    """What the layer computes before its output is quantized."""
    codes = np.clip(np.rint(x / INPUT.scale) + INPUT.zero_point, 0, 255) - INPUT.zero_point
    integers = torch.from_numpy(layer.weight_codes).double()
    sums = torch.nn.functional.conv2d(torch.from_numpy(codes).double(), integers, padding=1).numpy()
    step = (layer.input.scale.astype(np.float64) * layer.weight.scale)[:, None, None]
    return sums * step + (0 if bias is None else bias.astype(np.float64)[:, None, None])


def output_codes(y: NDArray, grid: QParams) -> NDArray[np.int64]:
    codes = np.rint(y / grid.scale.astype(np.float64)) + grid.zero_point
    return np.clip(codes, 0, grid.spec.qmax).astype(np.int64)


def assert_identity(graph: gs.Graph, layer: LayerRecipe, bias: NDArray | None, x: NDArray) -> None:
    assert layer.output is not None
    expected = output_codes(accumulated(layer, bias, x), layer.output)
    for integer in (True, False):
        actual = output_codes(infer(graph, {"x": x}, integer=integer)[0], layer.output)
        difference = np.abs(actual - expected)
        # The bias lies on the accumulator's grid, here at most a fifth of a code: values that near a tie may fall
        # to the other side, and no others.
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= 1 + 0.3 * difference.size


@settings(max_examples=40, deadline=None)
@given(
    copies=st.integers(1, 8),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.006, 0.02, 0.1]),
    loudness=st.sampled_from([1.0, 0.1, 30.0]),
    bits=st.sampled_from([6, 8]),
    with_bias=st.booleans(),
)
def test_the_copies_add_up_to_one_finer_grid(
    copies: int, share: float, scale: float, loudness: float, bits: int, with_bias: bool
) -> None:
    # 4 weights of 9 taps: |y| reaches 100 where x is loud, 0.006 * 255 * 8 = 12 is the widest fine grid.
    scale = scale if bits == 8 else 4 * scale  # a coarse weight has a coarse accumulator
    layer = stacked_layer(output_grid(scale, round(share * 255 * copies), copies), bits)
    bias = normal(1, 3) * np.float32(10) if with_bias else None

    graph = stacked(layer, bias) if copies > 1 else before_stacking(recipe_with([layer]), bias)

    assert_identity(graph, layer, bias, normal(2, 2, 4, *SIZE) * np.float32(loudness))


@pytest.mark.parametrize("zero_point", [0, 500, 255 * 4])
def test_far_outside_the_range_the_ends_of_the_grid_come_out(zero_point: int) -> None:
    grid = output_grid(0.01, zero_point, 4)
    layer = stacked_layer(grid)
    graph = stacked(layer, None)
    huge = np.float32([1e3, -1e3])[:, None, None, None] * np.ones((2, 4, *SIZE), np.float32)

    low, high = -0.01 * zero_point, 0.01 * (255 * 4 - zero_point)

    exact = accumulated(layer, None, huge)
    for integer in (True, False):
        y = infer(graph, {"x": huge}, integer=integer)[0]
        assert exact.max() > high + 1
        assert exact.min() < low - 1
        # Four numbers of up to 2.55 and one more, added in fp32.
        np.testing.assert_allclose(y[exact > high + 1], high, rtol=0, atol=1e-5)
        np.testing.assert_allclose(y[exact < low - 1], low, rtol=0, atol=1e-5)


def test_more_than_256_levels_come_out_of_8_bit_kernels(tmp_path: Path) -> None:
    layer = stacked_layer(output_grid(0.01, 1000, 8))
    graph = stacked(layer, normal(1, 3))

    (y,) = infer(graph, {"x": normal(2, 16, 4, *SIZE) * np.float32(0.3)})

    assert len(np.unique(output_codes(y, layer.output))) > 2 * 256
    save_graph(graph, tmp_path / "model.onnx")
    receipt = realized_on_ort(tmp_path / "model.onnx", [LayerInfo("conv2d", "net.conv2d", "conv", layer.macs, 8, 8)])
    assert [row.realized for row in receipt.rows] == [("QLinearConv",)]


def swap_two_biases(graph: gs.Graph) -> None:
    codes = graph.tensors()["conv2d.output.bias_codes"]
    codes.values = codes.values.reshape(4, -1)[[1, 0, 2, 3]].reshape(-1) + np.int32(5000)


def forget_the_start(graph: gs.Graph) -> None:
    start = graph.tensors()["conv2d.output.start"]
    start.values = np.zeros_like(start.values)


def stagger_by_256(graph: gs.Graph) -> None:
    codes, scale = (graph.tensors()[f"conv2d.output.bias_{part}"] for part in ("codes", "scale"))
    rows = codes.values.reshape(4, -1)
    one_code = np.round(0.02 / scale.values.reshape(4, -1)).astype(np.int32)
    codes.values = (rows - 3 * np.arange(4, dtype=np.int32)[:, None] * one_code).reshape(-1)


@pytest.mark.parametrize("spoil", [swap_two_biases, forget_the_start, stagger_by_256])
def test_the_identity_can_fail(spoil: Callable[[gs.Graph], None]) -> None:
    layer = stacked_layer(output_grid(0.02, 500, 4))
    graph, bias, x = stacked(layer, normal(1, 3)), normal(1, 3), normal(2, 2, 4, *SIZE)
    assert_identity(graph, layer, bias, x)

    spoil(graph)

    with pytest.raises(AssertionError):
        assert_identity(graph, layer, bias, x)


def test_each_copy_starts_where_the_last_one_saturates() -> None:
    grid = output_grid(0.5, 100, 3)

    biases = staggered_bias(np.array([1.0, -2.0]), grid)

    np.testing.assert_array_equal(biases, [[51.0, 48.0], [51 - 127.5, 48 - 127.5], [51 - 255, 48 - 255]])


def test_a_packed_weight_is_refused() -> None:
    # The last layer has 8-bit weights in every preset, so nobody needs it.
    with pytest.raises(PreconditionError, match="a packed or shifted weight cannot be stacked"):
        stacked(stacked_layer(FOUR_CODES, 4), None)


def test_a_weight_that_is_stored_shifted_is_stacked() -> None:
    exponent = np.int8([0, -1, 0, -1])
    layer = replace(stacked_layer(FOUR_CODES, 5), pts_exponent=exponent)
    graph, x = stacked(layer, None), normal(2, 2, 4, *SIZE)

    # Without exponents: the same integers on inputs that are shifted by hand, and a scale per channel.
    channels = np.exp2(exponent.astype(np.float32)).reshape(-1, 1, 1)
    on_grid = np.clip(np.rint(x / channels / INPUT.scale) + INPUT.zero_point, 0, 255) - INPUT.zero_point
    real = on_grid * INPUT.scale * channels
    weight = layer.weight_codes * layer.weight.scale.reshape(-1, 1, 1, 1)
    y = torch.nn.functional.conv2d(
        torch.from_numpy(real).double(), torch.from_numpy(weight).double(), padding=1
    ).numpy()
    difference = output_codes(infer(graph, {"x": x}, integer=True)[0], FOUR_CODES) - output_codes(y, FOUR_CODES)
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) <= 1 + 0.01 * difference.size


@pytest.mark.parametrize("with_bias", [True, False])
def test_biases_stay_in_floating_point_where_the_target_wants_them_so(with_bias: bool) -> None:
    layer, bias = stacked_layer(FOUR_CODES), normal(1, 3) if with_bias else None
    recipe, openvino = recipe_with([layer]), find_target("openvino")
    graph = float_graph(layer, bias)
    run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, openvino), QuantizeWeights(recipe, openvino)])

    run_passes(graph, [StackOutputCodes(recipe, integer_bias=False)])

    assert not [item for item in graph.tensors().values() if item.dtype == np.int32]
    assert_identity(graph, layer, bias, normal(2, 2, 4, *SIZE))


def test_layers_of_one_code_are_left_alone() -> None:
    recipe = recipe_with([stacked_layer(output_grid(0.1, 100, 1))])
    graph = before_stacking(recipe, normal(1, 3))
    before = ops(graph)

    (report,) = run_passes(graph, [StackOutputCodes(recipe)])

    assert report.changed == ()
    assert ops(graph) == before


def test_a_grouped_convolution_is_refused() -> None:
    layer = layer_recipe("conv2d", "conv", normal(0, 4, 2, 1, 1), INPUT, FOUR_CODES)
    recipe = recipe_with([replace(layer, groups=2)])
    nodes = [node("Conv", "x w", "conv2d", group=2)]
    shape = ("n", 4, 3, 3)
    graph = graph_of(build(nodes, {"x": shape}, {"conv2d": shape}, {"w": normal(0, 4, 2, 1, 1)}))
    run_passes(
        graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU), QuantizeWeights(recipe, ORT_CPU)]
    )

    with pytest.raises(PreconditionError, match=r"net.conv2d: only a plain convolution can stack output codes"):
        run_passes(graph, [StackOutputCodes(recipe)])


def test_a_linear_layer_is_refused() -> None:
    recipe = recipe_with([layer_recipe("linear", "linear", normal(0, 4, 4), INPUT, FOUR_CODES)])
    graph = graph_of(
        build([node("MatMul", "x w", "linear")], {"x": (2, 4)}, {"linear": (2, 4)}, {"w": normal(0, 4, 4).T})
    )
    run_passes(
        graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU), QuantizeWeights(recipe, ORT_CPU)]
    )

    with pytest.raises(PreconditionError, match=r"net.linear: only a plain convolution can stack output codes"):
        run_passes(graph, [StackOutputCodes(recipe)])


def test_float_weights_are_refused() -> None:
    recipe = recipe_with([stacked_layer(FOUR_CODES)])
    graph = float_graph(recipe.layers[0], normal(1, 3))
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU)])

    with pytest.raises(PreconditionError, match=r"net.conv2d: run QuantizeWeights first"):
        run_passes(graph, [StackOutputCodes(recipe)])


def test_second_run_is_refused() -> None:
    layer = stacked_layer(FOUR_CODES)

    with pytest.raises(PreconditionError, match=r"net.conv2d: its output is stacked already"):
        run_passes(stacked(layer, None), [StackOutputCodes(recipe_with([layer]))])


def test_a_staggered_bias_that_overflows_is_refused() -> None:
    # 255 * 15 steps of 1e4 are 4e7, against an accumulator step of 6e-4: more than 2^31.
    layer = stacked_layer(output_grid(1e4, 0, 16))
    assert 2**31 * float((INPUT.scale * layer.weight.scale).max()) < 255 * 15 * 1e4

    with pytest.raises(PreconditionError, match=r"net.conv2d: its bias does not fit 32 bits"):
        stacked(layer, normal(1, 3))


def test_a_float_output_breaks_the_promise() -> None:
    recipe = recipe_with([stacked_layer(FOUR_CODES)])

    with pytest.raises(PostconditionError, match=r"net.conv2d: its stacked output is not quantized"):
        StackOutputCodes(recipe).ensures(before_stacking(recipe, None))


def test_what_reads_a_stacked_value_may_quantize_it_and_scale_it() -> None:
    # The reader's factor stays where it is: the value lies on its grid, whose channels have one step.
    first = stacked_layer(output_grid(0.02, 255, 2), out=4)
    tau = np.float32([0.5, 1.0, 2.0, 4.0])
    second = replace(layer_recipe("conv2d_1", "conv", normal(3, 3, 4, 3, 3), INPUT, None), les_scale=tau)
    recipe = recipe_with([first, second])
    weights = {"w": normal(0, 4, 4, 3, 3), "v": normal(3, 3, 4, 3, 3) / tau[:, None, None]}
    nodes = [node("Conv", "x w", "conv2d", pads=[1] * 4), node("Conv", "conv2d v", "conv2d_1", pads=[1] * 4)]
    graph = graph_of(build(nodes, {"x": ("n", 4, *SIZE)}, {"conv2d_1": ("n", 3, *SIZE)}, weights))
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU)])
    run_passes(graph, [QuantizeWeights(recipe, ORT_CPU), StackOutputCodes(recipe)])
    x = normal(2, 2, 4, *SIZE)
    before = infer(graph, {"x": x})[0]

    (report,) = run_passes(graph, [FoldRescales(recipe)])

    assert report.skipped == (("conv2d.rescale", "conv2d comes from Sum"),)
    np.testing.assert_array_equal(infer(graph, {"x": x})[0], before)
    codes = output_codes(accumulated(first, None, x), first.output)  # type: ignore[arg-type]
    assert codes.max() > 300
    read = (codes - 255) * np.float32(0.02) / tau[:, None, None]
    integers = np.clip(np.rint(read / INPUT.scale) + INPUT.zero_point, 0, 255) - INPUT.zero_point
    sums = torch.nn.functional.conv2d(
        torch.from_numpy(integers).double(), torch.from_numpy(second.weight_codes).double(), padding=1
    ).numpy()
    wanted = sums * (INPUT.scale.astype(np.float64) * second.weight.scale)[:, None, None]
    np.testing.assert_allclose(before, wanted, atol=0.05 * np.abs(wanted).max())
