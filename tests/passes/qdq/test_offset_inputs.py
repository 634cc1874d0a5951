"""``conv(s (q - z))`` out of codes that an engine has, through ONNX Runtime's reference numerics."""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import OPS, OUT, computed, float_model, float_weight, input_grid, sample, scaled_layer
from nets.toy_nets import node
from nets.toy_recipes import ORT_CPU, layer_recipe, recipe_with
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.offset_inputs import OffsetInputs
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target

SIGNED = replace(ORT_CPU, name="signed", symmetric=True)
BIAS = normal(1, OUT)


def plain_layer(op: str, grid: QParams, bits: int = 8) -> LayerRecipe:
    return scaled_layer(op, grid, None, bits, None, None)


def lowered(op: str, layer: LayerRecipe, target: Target, bias: NDArray = BIAS) -> gs.Graph:
    recipe = recipe_with([layer])
    graph = graph_of(float_model(op, float_weight(op), bias))
    run_passes(
        graph,
        [BindRecipe(recipe), InsertQdq(recipe, target), QuantizeWeights(recipe, target), OffsetInputs(recipe, target)],
    )
    return graph


def assert_computes(op: str, layer: LayerRecipe, graph: gs.Graph, x: NDArray) -> None:
    (actual,) = infer(export_model(graph), {"x": x})
    expected = computed(op, layer, BIAS, x)
    # Half an accumulator step of the bias, and fp32 sums.
    step = float((layer.input.scale * layer.weight_step).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=step + 2e-6 * np.abs(expected).max())


def off_ties(x: NDArray, grid: QParams) -> NDArray[np.float32]:
    """Samples in the middle of their code, where every way of adding an offset rounds alike."""
    return (np.rint(x / grid.scale) * grid.scale).astype(np.float32)


@pytest.mark.parametrize("op", OPS)
@given(zero_point=st.integers(0, 255), seed=st.integers(0, 9), scale=st.sampled_from([0.02, 0.05, 1 / 3]))
@settings(max_examples=12, deadline=None)
def test_a_signed_code_carries_every_zero_point(op: str, zero_point: int, seed: int, scale: float) -> None:
    grid = input_grid(scale, zero_point)
    layer = plain_layer(op, grid)

    graph = lowered(op, layer, SIGNED)

    assert_computes(op, layer, graph, off_ties(sample(op, seed), grid))
    (quantize,) = (node for node in graph.nodes if node.op == "QuantizeLinear")
    assert quantize.inputs[2].values.dtype == np.int8
    assert quantize.inputs[2].values == 0


@pytest.mark.parametrize("target", [ORT_CPU, SIGNED], ids=lambda target: target.name)
@given(codes=st.integers(2, 6), share=st.floats(0, 1), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_several_codes_add_up_to_a_finer_grid(target: Target, codes: int, share: float, seed: int) -> None:
    grid = input_grid(8 / (255 * codes), round(share * 255 * codes), codes)
    layer = plain_layer("Conv", grid)

    graph = lowered("Conv", layer, target)

    assert_computes("Conv", layer, graph, off_ties(sample("Conv", seed), grid))


def test_the_border_sees_zeros_and_not_the_zero_point() -> None:
    grid = input_grid(0.05, 200)
    layer = plain_layer("Conv", grid)
    x = np.zeros((1, 4, 5, 5), np.float32)

    (actual,) = infer(export_model(lowered("Conv", layer, SIGNED)), {"x": x})

    # A convolution of zeros is its bias, at the border as in the middle.
    expected = np.broadcast_to(BIAS[:, None, None], actual.shape[1:])
    np.testing.assert_allclose(actual[0], expected, atol=float((grid.scale * layer.weight.scale).max()))


@pytest.mark.parametrize("bits", [4, 6, 7])
def test_narrow_grids_sit_in_signed_codes_without_an_offset(bits: int) -> None:
    grid = input_grid(0.2, 3, bits=bits)
    layer = plain_layer("Conv", grid)

    graph = lowered("Conv", layer, SIGNED)

    assert "Add" not in ops(graph)
    assert "Pad" not in ops(graph)
    (clip,) = (node for node in graph.nodes if node.op == "Clip")
    assert clip.outputs[0].outputs[0].op == "QuantizeLinear"  # signed engines want nothing between Q and DQ
    assert_computes("Conv", layer, graph, off_ties(sample("Conv") * 3, grid))


def test_a_centred_grid_needs_no_offset() -> None:
    layer = plain_layer("Conv", input_grid(0.05, 128))

    graph = lowered("Conv", layer, SIGNED)

    assert not {"Add", "Pad", "Clip"} & set(ops(graph))
    assert_computes("Conv", layer, graph, off_ties(sample("Conv"), layer.input))


@pytest.mark.parametrize("op", OPS)
def test_stripping_brings_the_float_layer_back(op: str) -> None:
    layer = plain_layer(op, input_grid(0.05, 90))
    graph = lowered(op, layer, SIGNED)

    run_passes(graph, [StripQdq()])

    x = sample(op)
    (actual,) = infer(export_model(graph), {"x": x})
    (expected,) = infer(float_model(op, dequantized(op, layer), BIAS), {"x": x})
    np.testing.assert_allclose(actual, expected, atol=float((layer.input.scale * layer.weight.scale).max()) + 1e-5)


def test_stripping_keeps_one_of_several_codes() -> None:
    layer = plain_layer("Conv", input_grid(0.01, 300, codes=3))
    graph = lowered("Conv", layer, ORT_CPU)

    run_passes(graph, [StripQdq()])

    x = sample("Conv")
    (actual,) = infer(export_model(graph), {"x": x})
    (expected,) = infer(float_model("Conv", dequantized("Conv", layer), BIAS), {"x": x})
    np.testing.assert_allclose(actual, expected, atol=float((layer.input.scale * layer.weight.scale).max()) + 1e-5)


def dequantized(op: str, layer: LayerRecipe) -> NDArray[np.float32]:
    codes = layer.weight_codes.astype(np.float32)
    return codes * layer.weight.scale.reshape(-1, *[1] * (codes.ndim - 1))


@pytest.mark.parametrize("op", ["grouped Conv", "MatMul", "Gemm"])
def test_only_a_plain_convolution_takes_several_codes(op: str) -> None:
    with pytest.raises(PreconditionError, match="only a plain convolution"):
        lowered(op, plain_layer(op, input_grid(0.01, 300, codes=3)), ORT_CPU)


def test_a_packed_weight_is_not_repeated() -> None:
    with pytest.raises(PreconditionError, match="packed or shifted"):
        lowered("Conv", plain_layer("Conv", input_grid(0.01, 300, codes=3), bits=4), ORT_CPU)


def test_narrow_codes_do_not_add_up() -> None:
    with pytest.raises(PreconditionError, match="only 8-bit codes"):
        lowered("Conv", plain_layer("Conv", input_grid(0.1, 40, codes=2, bits=6)), ORT_CPU)


def test_a_second_run_is_refused() -> None:
    layer = plain_layer("Conv", input_grid(0.05, 90))
    graph = lowered("Conv", layer, SIGNED)

    with pytest.raises(PreconditionError, match="already"):
        run_passes(graph, [OffsetInputs(recipe_with([layer]), SIGNED)])


def test_weights_come_first() -> None:
    recipe = recipe_with([plain_layer("Conv", input_grid(0.05, 90))])
    graph = graph_of(float_model("Conv", float_weight("Conv"), BIAS))
    run_passes(graph, [BindRecipe(recipe)])

    with pytest.raises(PreconditionError, match="run QuantizeWeights first"):
        run_passes(graph, [OffsetInputs(recipe, SIGNED)])


def test_an_input_left_in_float_is_noticed() -> None:
    recipe = recipe_with([plain_layer("Conv", input_grid(0.05, 90))])
    graph = graph_of(float_model("Conv", float_weight("Conv"), BIAS))
    run_passes(graph, [BindRecipe(recipe)])

    with pytest.raises(PostconditionError, match="not quantized"):
        OffsetInputs(recipe, SIGNED).ensures(graph)


def test_layers_that_read_one_value_alike_share_its_codes() -> None:
    grid = input_grid(0.05, 90)
    layer = plain_layer("Conv", grid)
    twin = replace(layer, name="conv2d_1", path="conv2d_1")
    model = float_model("Conv", float_weight("Conv"), BIAS)
    second = model.graph.node.add()
    second.CopyFrom(model.graph.node[0])
    second.name, second.output[0] = "second", "conv2d_1"
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = "conv2d_1"
    recipe = recipe_with([layer, twin])
    graph = graph_of(model)

    run_passes(
        graph,
        [BindRecipe(recipe), InsertQdq(recipe, SIGNED), QuantizeWeights(recipe, SIGNED), OffsetInputs(recipe, SIGNED)],
    )

    assert ops(graph).count("QuantizeLinear") == 1


@pytest.mark.parametrize("rank", [2, 3])
def test_a_product_without_bias_keeps_its_rank(rank: int) -> None:
    weight = normal(0, OUT, 4)
    layer = layer_recipe("linear", "linear", weight, input_grid(0.05, 90))
    shape, result = (("n", 4), ("n", OUT)) if rank == 2 else (("n", 3, 4), ("n", 3, OUT))
    model = build([node("MatMul", "x w", "linear")], {"x": shape}, {"linear": result}, {"w": weight.T.copy()})
    recipe, graph = recipe_with([layer]), graph_of(model)
    x = off_ties(normal(1, 2, *[3] * (rank - 2), 4), layer.input)

    run_passes(
        graph,
        [BindRecipe(recipe), InsertQdq(recipe, SIGNED), QuantizeWeights(recipe, SIGNED), OffsetInputs(recipe, SIGNED)],
    )

    (actual,) = infer(export_model(graph), {"x": x})
    expected = x @ (layer.weight_codes * layer.weight.scale[:, None]).T
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_automatic_padding_is_refused() -> None:
    layer = plain_layer("Conv", input_grid(0.05, 90))
    recipe, graph = recipe_with([layer]), graph_of(float_model("Conv", float_weight("Conv"), BIAS))
    graph.nodes[0].attrs["auto_pad"] = "SAME_UPPER"
    before = [BindRecipe(recipe), InsertQdq(recipe, SIGNED), QuantizeWeights(recipe, SIGNED)]
    run_passes(graph, before)

    with pytest.raises(PreconditionError, match="its padding is SAME_UPPER; give it in numbers"):
        run_passes(graph, [OffsetInputs(recipe, SIGNED)])
