import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.toy_nets import conv_net, node, token_net
from nets.toy_recipes import ORT_CPU, activation_grid, layer_recipe, recipe_for, recipe_with
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe

UNIT = np.eye(4, dtype=np.float32)


def grid(bits: int, scale: float, zero_point: int) -> QParams:
    return QParams(QuantSpec(bits, signed=False), np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


def unit_layer(name: str, x: QParams, y: QParams | None = None, kind: str = "linear") -> LayerRecipe:
    weight = UNIT if kind == "linear" else UNIT.reshape(4, 4, 1, 1)
    return layer_recipe(name, kind, weight, x, y)


def unit_model() -> onnx.ModelProto:
    """``y = x``, by way of a weight: what comes out is what the grid made of x."""
    return build([node("MatMul", "x w", "linear")], {"x": (2, 4)}, {"linear": (2, 4)}, {"w": UNIT})


def quantized(model: onnx.ModelProto, recipe: QuantRecipe) -> gs.Graph:
    graph = graph_of(model)
    run_passes(graph, [FoldConstants(), BindRecipe(recipe), InsertQdq(recipe, ORT_CPU)])
    return graph


def fake_quantize(x: NDArray, grid: QParams) -> NDArray:
    codes = np.clip(np.rint(x / grid.scale) + grid.zero_point, grid.spec.qmin, grid.spec.qmax)
    return (grid.scale * (codes - grid.zero_point)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), scale=st.sampled_from([0.25, 0.5, 2.0]), data=st.data())
def test_activations_land_on_the_grid_as_fake_quant_puts_them(bits: int, scale: float, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, 2**bits - 1))
    # Powers of two: quarters of a step are exact, ties included, and half of them lie outside the range.
    quarters = st.integers(-4 * 2**bits, 8 * 2**bits)
    x = np.float32(data.draw(st.lists(quarters, min_size=8, max_size=8))).reshape(2, 4) * np.float32(scale / 4)
    params = grid(bits, scale, zero_point)

    graph = quantized(unit_model(), recipe_with([unit_layer("linear", params)]))

    np.testing.assert_array_equal(infer(export_model(graph), {"x": x})[0], fake_quantize(x, params))


def test_ties_round_to_even() -> None:
    graph = quantized(unit_model(), recipe_with([unit_layer("linear", grid(8, 1.0, 10))]))
    x = np.float32([[0.5, 1.5, 2.5, -0.5], [-1.5, -2.5, 3.5, 0.0]])

    np.testing.assert_array_equal(infer(export_model(graph), {"x": x})[0], [[0, 2, 2, 0], [-2, -2, 4, 0]])


@pytest.mark.parametrize(("bits", "expected"), [(8, 245.0), (6, 53.0), (2, 1.0)])
def test_narrow_grids_really_clip(bits: int, expected: float) -> None:
    zero_point = 10 if bits > 2 else 2
    graph = quantized(unit_model(), recipe_with([unit_layer("linear", grid(bits, 1.0, zero_point))]))

    (y,) = infer(export_model(graph), {"x": np.full((2, 4), 1e6, np.float32)})

    assert (y == expected).all()
    assert ("Clip" in ops(graph)) is (bits < 8)  # QuantizeLinear saturates at 8 bits by itself


def test_a_convolution_gets_a_grid_on_its_output() -> None:
    shape = (1, 4, 2, 2)
    model = build([node("Conv", "x w", "conv2d")], {"x": shape}, {"conv2d": shape}, {"w": UNIT.reshape(4, 4, 1, 1)})
    output = grid(8, 0.3137, 128)  # no multiple of 0.125 is a tie
    graph = quantized(model, recipe_with([unit_layer("conv2d", grid(8, 0.125, 128), output, "conv")]))
    x = normal(0, *shape, mean=3.0)

    expected = fake_quantize(fake_quantize(x, grid(8, 0.125, 128)), output)

    assert ops(graph) == ["QuantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear"]
    # In integers ONNX Runtime would round the float weight by itself.
    np.testing.assert_array_equal(infer(graph, {"x": x}, integer=False)[0], expected)


def test_readers_of_a_gridded_result_read_the_grid() -> None:
    net = conv_net()
    graph = quantized(net.model, recipe_for(net))

    for name in ("add", "add_1"):
        (add,) = [item for item in graph.nodes if item.name == node_name(name)]
        assert any(value.inputs and value.inputs[0].op == "DequantizeLinear" for value in add.inputs)
    (conv,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    assert [reader.op for reader in conv.outputs[0].outputs] == ["QuantizeLinear"]


def test_scales_and_zero_points_are_scalars() -> None:
    # A scale of shape [1] loses int8 on TensorRT; ONNX Runtime's QLinearAdd refuses it.
    net = conv_net()
    model = export_model(quantized(net.model, recipe_for(net, 8, 6)))

    ranks = {item.name: len(item.dims) for item in model.graph.initializer}
    grids = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip")]
    assert grids
    assert {ranks[name] for item in grids for name in item.input[1:]} == {0}


def two_readers() -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "linear"), node("MatMul", "x w", "linear_1"), node("Sub", "linear linear_1", "y")]
    return build(nodes, {"x": (2, 4)}, {"y": (2, 4)}, {"w": UNIT})


def test_one_grid_on_one_value_is_one_pair_of_nodes() -> None:
    layers = [unit_layer(name, grid(8, 0.5, 3)) for name in ("linear", "linear_1")]

    graph = quantized(two_readers(), recipe_with(layers))

    assert ops(graph).count("QuantizeLinear") == ops(graph).count("DequantizeLinear") == 1


@pytest.mark.parametrize("other", [grid(8, 0.25, 3), grid(8, 0.5, 4), grid(6, 0.5, 3)])
def test_other_grids_on_one_value_stay_apart(other: QParams) -> None:
    first = grid(8, 0.5, 3)
    graph = quantized(two_readers(), recipe_with([unit_layer("linear", first), unit_layer("linear_1", other)]))
    x = normal(0, 2, 4, mean=1.0) * 8

    assert ops(graph).count("QuantizeLinear") == 2
    np.testing.assert_array_equal(
        infer(export_model(graph), {"x": x})[0], fake_quantize(x, first) - fake_quantize(x, other)
    )


def test_queries_keys_and_values_share_their_input() -> None:
    net = token_net()

    graph = quantized(net.model, recipe_for(net))

    assert ops(graph).count("QuantizeLinear") == 2  # x, and what goes into the output projection


def test_an_output_of_several_codes_is_left_to_its_own_pass() -> None:
    shape = (1, 4, 2, 2)
    model = build([node("Conv", "x w", "conv2d")], {"x": shape}, {"conv2d": shape}, {"w": UNIT.reshape(4, 4, 1, 1)})
    output = QParams(QuantSpec(8, signed=False, codes=2), np.asarray(0.5, np.float32), np.asarray(300, np.int32))

    graph = quantized(model, recipe_with([unit_layer("conv2d", grid(8, 0.125, 128), output, "conv")]))

    assert ops(graph) == ["QuantizeLinear", "DequantizeLinear", "Conv"]


def test_a_layer_without_its_node_is_refused() -> None:
    recipe = recipe_with([unit_layer("linear_9", grid(8, 1.0, 0))])

    with pytest.raises(PreconditionError, match=r"net.linear_9: no node node_linear_9; run BindRecipe first"):
        run_passes(graph_of(unit_model()), [InsertQdq(recipe, ORT_CPU)])


def test_second_run_is_refused() -> None:
    recipe = recipe_with([unit_layer("linear", grid(8, 1.0, 0))])
    graph = quantized(unit_model(), recipe)

    with pytest.raises(PreconditionError, match=r"net.linear: its input is quantized already"):
        run_passes(graph, [InsertQdq(recipe, ORT_CPU)])


def test_a_float_input_breaks_the_promise() -> None:
    recipe = recipe_with([unit_layer("linear", activation_grid(UNIT))])

    with pytest.raises(PostconditionError, match=r"net.linear: its input is not quantized"):
        InsertQdq(recipe, ORT_CPU).ensures(graph_of(unit_model()))
