"""Power-of-two scaling in its two forms: one function, and the same integers wherever they can be compared."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import graph_of, infer, normal, ops
from nets.scaled_layers import OPS, computed, float_model, float_weight, sample, scaled_layer
from nets.toy_recipes import recipe_with
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tfmq_export.errors import PostconditionError, TargetError
from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.pts_lowering import Form, choose_form
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.names import weight_codes_name, weight_dequantizer_name
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import PtsLowering, Target, find_target

PACKING = Target("packing", engine="test", packed_weights=True)
PLAIN = Target("plain", engine="test", packed_weights=False)
GRIDDED = replace(PACKING, name="gridded", quantized_outputs=frozenset({"conv"}))
X = QParams(QuantSpec(8, signed=False), np.asarray(0.08, np.float32), np.asarray(120, np.int32))
NARROW = QParams(QuantSpec(6, signed=False), np.asarray(0.3, np.float32), np.asarray(30, np.int32))
EXPONENT = np.int8([0, -3, -1, 0])
TAU = np.float32([0.5, 3.1, 0.27, 1.9])


def lowered(
    model: onnx.ModelProto, layer: LayerRecipe, target: Target, asked: PtsLowering = "auto"
) -> tuple[gs.Graph, list[PassReport]]:
    recipe = recipe_with([layer])
    graph = graph_of(model)
    passes = [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, target)]
    reports = run_passes(graph, [*passes, QuantizeWeights(recipe, target, asked)])
    onnx.checker.check_model(export_model(graph))
    return graph, list(reports)


def run(graph: gs.Graph, x: NDArray) -> NDArray:
    """Reference numerics: no integer kernels."""
    return infer(graph, {"x": x}, integer=False)[0]


def integers(graph: gs.Graph, name: str) -> NDArray:
    """What the layer's DequantizeLinear reads, after the engine folded what leads there."""
    model = export_model(graph)
    (dequantize,) = [item for item in model.graph.node if item.name == weight_dequantizer_name(name)]
    del model.graph.input[:], model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("stored", TensorProto.INT8, None)  # Identity: it may be an initializer
    )
    chain = {output: item for item in model.graph.node for output in item.output}
    needed, wanted = [], [dequantize.input[0]]
    while wanted:
        item = chain.get(wanted.pop())
        if item is not None:
            needed.insert(0, item)
            wanted += item.input
    del model.graph.node[:]
    model.graph.node.extend([*needed, onnx.helper.make_node("Identity", [dequantize.input[0]], ["stored"])])
    return infer(model, {})[0]


exponents = st.lists(st.integers(-4, 0), min_size=4, max_size=4).map(lambda values: np.int8(values))


@settings(max_examples=30, deadline=None)
@given(op=st.sampled_from(OPS), exponent=exponents, tau=st.booleans(), bits=st.sampled_from([2, 3, 4]))
def test_all_forms_are_the_recipes_function(op: str, exponent: NDArray, tau: bool, bits: int) -> None:
    layer = scaled_layer(op, X, None, bits, TAU if tau else None, exponent)
    bias = normal(1, len(layer.weight_codes))
    model = float_model(op, float_weight(op), bias)
    integer_bias = replace(PACKING, integer_bias=True)

    graphs = {form: lowered(model, layer, integer_bias, form)[0] for form in ("fold", "shift")}

    x = sample(op)
    expected = computed(op, layer, bias, x)
    for form, graph in graphs.items():
        # Sums of at most 36 products of fp32 numbers.
        np.testing.assert_allclose(run(graph, x), expected, rtol=1e-5, atol=2e-4, err_msg=form)
    if len(set(exponent.tolist())) > 1:
        np.testing.assert_array_equal(integers(graphs["fold"], layer.name), integers(graphs["shift"], layer.name))
        np.testing.assert_array_equal(run(graphs["fold"], x), run(graphs["shift"], x))


# -- the choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "target", "form"),
    [
        (4, PACKING, "shift"),
        (2, PACKING, "shift"),
        (5, PACKING, "fold"),
        (4, PLAIN, "fold"),
        (4, GRIDDED, "shift"),
    ],
)
def test_the_form_follows_from_bits_and_target(bits: int, target: Target, form: Form) -> None:
    layer = scaled_layer("Conv", X, None, bits, None, EXPONENT)

    assert choose_form(layer, target) == form


@pytest.mark.parametrize(("code", "fits"), [(63, True), (64, False), (-64, True), (-65, False)])
def test_the_container_decides_by_the_integers_themselves(code: int, fits: bool) -> None:
    # Times 2: 126, 128, -128 and -130.
    layer = scaled_layer("MatMul", X, None, 8, None, np.int8([0, -1, 0, 0]))

    codes = np.sign(layer.weight_codes) * np.int8(1)
    codes[0, 0] = code

    layer = replace(layer, weight_codes=codes.astype(np.int8))

    if fits:
        assert choose_form(layer, PLAIN) == "fold"
    else:
        with pytest.raises(TargetError, match="its 8-bit weight shifted by PTS does not fit 8 bits"):
            choose_form(layer, PLAIN)


@pytest.mark.parametrize("exponent", [None, np.int8([0, 0, 0, 0]), np.int8([-2, -2, -2, -2])])
def test_layers_whose_channels_agree_have_no_form(exponent: NDArray | None) -> None:
    layer = scaled_layer("Conv", X, None, 8, None, exponent)

    assert choose_form(layer, PLAIN, "shift") is None
    graph, reports = lowered(float_model("Conv", float_weight("Conv"), normal(1, 6)), layer, PLAIN)
    assert reports[-1].notes == ()
    x = sample("Conv")
    np.testing.assert_allclose(run(graph, x), exact(layer, normal(1, 6), x), rtol=1e-5, atol=1e-3)


def exact(layer: LayerRecipe, bias: NDArray, x: NDArray) -> NDArray:
    """The recipe with a bias in floating point."""
    return computed("Conv", layer, np.zeros(6), x) + bias[:, None, None]


@pytest.mark.parametrize(
    ("bits", "target", "asked", "reason"),
    [
        (8, PACKING, "fold", "its 8-bit weight shifted by PTS does not fit 8 bits; use 4-bit weights or --pts off"),
        (8, PACKING, "shift", "its 8-bit weight shifted by PTS does not fit 8 bits; use 4-bit weights or --pts off"),
        (4, PLAIN, "shift", "plain does not fold arithmetic on integer constants; use --pts-lowering fold, auto or"),
        (8, GRIDDED, "auto", "does not fit 8 bits; use 4-bit weights or --pts off for gridded"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_one_that_can(
    bits: int, target: Target, asked: PtsLowering, reason: str
) -> None:
    layer = scaled_layer("Conv", X, None, bits, None, EXPONENT)

    with pytest.raises(TargetError, match=r"^net\.conv2d: ") as caught:
        choose_form(layer, target, asked)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("bits", "asked"), [(4, "fold"), (4, "shift")])
def test_what_was_chosen_is_reported(bits: int, asked: PtsLowering) -> None:
    layer = scaled_layer("MatMul", X, None, bits, None, EXPONENT)

    _, reports = lowered(float_model("MatMul", float_weight("MatMul"), normal(1, 6)), layer, PACKING, asked)

    assert [note for report in reports for note in report.notes] == [("net.linear", f"power-of-two scaling: {asked}")]


# -- storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_targets_that_fold_no_constants_get_plain_integers_and_float_biases(op: str) -> None:
    layer = scaled_layer(op, X, None, 4, TAU, EXPONENT)
    bias = normal(1, len(layer.weight_codes))

    graph, _ = lowered(float_model(op, float_weight(op), bias), layer, find_target("tensorrt"))

    assert not {"Cast", "BitShift"} & set(ops(graph))
    assert ops(graph).count("Mul") == 1  # of the input
    stored = {item.name: item for item in export_model(graph).graph.initializer}
    assert stored[weight_codes_name(layer.name)].data_type == TensorProto.INT8
    assert TensorProto.INT32 not in [item.data_type for item in stored.values()]
    assert any(np.array_equal(numpy_helper.to_array(item).reshape(-1), bias) for item in stored.values())


def test_packed_weights_of_a_folded_layer_are_bytes() -> None:
    layer = scaled_layer("Conv", X, None, 4, None, EXPONENT)

    graph, _ = lowered(float_model("Conv", float_weight("Conv"), normal(1, 6)), layer, PACKING, "fold")

    assert "Cast" not in ops(graph)


# -- refusals ------------------------------------------------------------------------------------------


def test_weights_that_were_not_scaled_are_refused() -> None:
    layer = scaled_layer("Conv", X, None, 4, TAU, EXPONENT)
    recipe, graph = recipe_with([layer]), graph_of(float_model("Conv", float_weight("Conv"), normal(1, 6)))

    with pytest.raises(PostconditionError, match="the recipe's integers are not a rounding of this weight"):
        run_passes(graph, [BindRecipe(recipe), InsertQdq(recipe, PLAIN), QuantizeWeights(recipe, PLAIN)])
