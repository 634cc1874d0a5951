"""Power-of-two scaling in its three forms: one function, and the same integers wherever they can be compared."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import OPS, computed, float_model, float_weight, per_weight, sample, scaled_layer
from nets.toy_nets import node
from nets.toy_recipes import layer_recipe, recipe_with
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tfmq_export.errors import PostconditionError, PreconditionError, TargetError
from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.pts_lowering import Form, choose_form
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.passes.scaling.split_exponents import SplitExponents, exponent_parts, split_recipe
from tfmq_export.proof.simulate import QuantizedLayer
from tfmq_export.recipe.grid import QParams, QuantSpec
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
    split = choose_form(layer, target, asked) == "split"
    names = frozenset([layer.name] if split else [])
    parts = split_recipe(recipe, names)
    graph = graph_of(model)
    passes = [BindRecipe(recipe), RescaleInputs(recipe), SplitExponents(recipe, names), InsertQdq(parts, target)]
    reports = run_passes(graph, [*passes, QuantizeWeights(parts, target, asked)])
    onnx.checker.check_model(export_model(graph))
    return graph, list(reports)


def run(graph: gs.Graph, x: NDArray) -> NDArray:
    """Reference numerics: no integer kernels."""
    return infer(graph, {"x": x}, integer=False)[0]


def integers(graph: gs.Graph, name: str) -> NDArray:
    """What the layer's DequantizeLinear reads, after the engine folded what leads there."""
    model = export_model(graph)
    (dequantize,) = [item for item in model.graph.node if item.name == f"{name}.weight_dq"]
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

    graphs = {form: lowered(model, layer, integer_bias, form)[0] for form in ("fold", "shift", "split")}

    x = sample(op)
    expected = computed(op, layer, bias, x)
    for form, graph in graphs.items():
        # Sums of at most 36 products of fp32 numbers.
        np.testing.assert_allclose(run(graph, x), expected, rtol=1e-5, atol=2e-4, err_msg=form)
    if len(set(exponent.tolist())) > 1:
        np.testing.assert_array_equal(integers(graphs["fold"], layer.name), integers(graphs["shift"], layer.name))
        np.testing.assert_array_equal(run(graphs["fold"], x), run(graphs["shift"], x))


@settings(max_examples=30, deadline=None)
@given(
    exponent=exponents,
    group=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    zero_point=st.integers(0, 255),
    scaled=st.booleans(),
)
def test_eight_bit_convolutions_split_are_pytorchs_fake_quant(  # noqa: PLR0913
    exponent: NDArray, group: int, kernel: int, stride: int, pads: list[int], zero_point: int, scaled: bool
) -> None:
    tau = TAU if scaled else None
    weight, bias = normal(0, 6, 4 // group, kernel, kernel), normal(1, 6)
    layer = replace(
        layer_recipe("conv2d", "conv", weight * scaled_by(tau, weight, group), X),
        input=replace(X, zero_point=np.asarray(zero_point, np.int32)),
        groups=group,
        les_scale=tau,
        pts_exponent=exponent,
    )
    nodes = [node("Conv", "x w b", "conv2d", group=group, strides=[stride] * 2, pads=pads)]
    model = build(nodes, {"x": ("n", 4, 5, 6)}, {"conv2d": ("n", 6, "h", "w")}, {"w": weight, "b": bias})

    graph, _ = lowered(model, layer, PLAIN, "split" if len(set(exponent.tolist())) > 1 else "auto")

    x = normal(2, 2, 4, 5, 6) * np.float32([1, 4, 0.5, 2]).reshape(-1, 1, 1)
    reference = QuantizedLayer(layer)
    on_grid = reference.quantize_input(torch.from_numpy(x), torch.tensor([0]))
    # Zeros are padded behind the quantizer, where they are exact whatever the zero point.
    padded = torch.nn.functional.pad(on_grid, (pads[1], pads[3], pads[0], pads[2]))
    y = torch.nn.functional.conv2d(padded, reference.weight, torch.from_numpy(bias), stride, groups=group)
    # Up to 36 products of numbers of up to 80, in another order.
    np.testing.assert_allclose(run(graph, x), y.numpy(), rtol=1e-5, atol=5e-4)


def scaled_by(tau: NDArray | None, weight: NDArray, group: int) -> NDArray:
    """tau against a weight [6, 4 / group, k, k]."""
    if tau is None:
        return np.ones((), np.float32)
    rows = tau.reshape(group, -1).repeat(len(weight) // group, axis=0)
    return rows.reshape(*rows.shape, 1, 1)


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Gemm transposed"])
def test_eight_bit_linear_layers_split_are_pytorchs_fake_quant(op: str) -> None:
    layer = scaled_layer(op, X, None, 8, TAU, EXPONENT)
    bias = normal(1, len(layer.weight_codes))
    graph, _ = lowered(float_model(op, float_weight(op), bias), layer, PLAIN)

    x = sample(op)
    reference = QuantizedLayer(layer)
    y = reference.quantize_input(torch.from_numpy(x), torch.tensor([0])) @ reference.weight.T + torch.from_numpy(bias)

    assert ops(graph).count("Gather") == 3  # exponents 0, -1 and -3
    np.testing.assert_allclose(run(graph, x), y.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_narrow_activations_clip_in_every_part(op: str) -> None:
    layer = scaled_layer(op, NARROW, None, 8, None, EXPONENT)
    bias = normal(1, len(layer.weight_codes))
    graph, _ = lowered(float_model(op, float_weight(op), bias), layer, replace(PLAIN, integer_bias=True))

    assert ops(graph).count("Clip") == (1 if op == "grouped Conv" else 3)
    np.testing.assert_allclose(run(graph, sample(op)), computed(op, layer, bias, sample(op)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_the_parts_hold_every_integer_once(op: str) -> None:
    layer = scaled_layer(op, X, None, 8, None, EXPONENT)

    parts = exponent_parts(layer)

    shifted = [part.layer.weight.scale / layer.weight.scale for part in parts]
    np.testing.assert_array_equal([ratio[0] for ratio in shifted], [2.0**-3, 2.0**-1, 1.0])
    assert sum(part.layer.macs for part in parts) == layer.macs
    whole = np.zeros(layer.weight_codes.shape, np.float64)
    for part in parts:
        codes = part.layer.weight_codes * part.layer.weight.scale.astype(np.float64).reshape(
            -1, *[1] * (layer.weight_codes.ndim - 1)
        )
        if layer.groups == 1:
            whole[:, part.own] += codes
        else:
            whole += codes
    scale = layer.weight.scale.astype(np.float64).reshape(-1, *[1] * (whole.ndim - 1))
    shift = per_weight(op, np.exp2(EXPONENT.astype(np.float64)), whole)
    np.testing.assert_allclose(whole, layer.weight_codes * scale * shift, rtol=1e-6)


# -- the choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "target", "form"),
    [
        (4, PACKING, "shift"),
        (2, PACKING, "shift"),
        (5, PACKING, "fold"),
        (4, PLAIN, "fold"),
        (8, PACKING, "split"),
        (8, PLAIN, "split"),
        (4, GRIDDED, "shift"),
    ],
)
def test_the_form_follows_from_bits_and_target(bits: int, target: Target, form: Form) -> None:
    layer = scaled_layer("Conv", X, None, bits, None, EXPONENT)

    assert choose_form(layer, target) == form


@pytest.mark.parametrize(("code", "form"), [(63, "fold"), (64, "split"), (-64, "fold"), (-65, "split")])
def test_the_container_decides_by_the_integers_themselves(code: int, form: Form) -> None:
    # Times 2: 126, 128, -128 and -130.
    layer = scaled_layer("MatMul", X, None, 8, None, np.int8([0, -1, 0, 0]))

    codes = np.sign(layer.weight_codes) * np.int8(1)
    codes[0, 0] = code

    assert choose_form(replace(layer, weight_codes=codes.astype(np.int8)), PLAIN) == form


@pytest.mark.parametrize("exponent", [None, np.int8([0, 0, 0, 0]), np.int8([-2, -2, -2, -2])])
def test_layers_whose_channels_agree_have_no_form(exponent: NDArray | None) -> None:
    layer = scaled_layer("Conv", X, None, 8, None, exponent)

    assert choose_form(layer, PLAIN, "split") is None
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
        (8, PACKING, "fold", "its 8-bit weight shifted by PTS does not fit 8 bits; use --pts-lowering split, auto or"),
        (8, PACKING, "shift", "its 8-bit weight shifted by PTS does not fit 8 bits; use --pts-lowering split, auto or"),
        (4, PLAIN, "shift", "plain does not fold arithmetic on integer constants; use --pts-lowering fold, auto or"),
        (4, GRIDDED, "split", "leaves no conv with an output grid of its own; use --pts-lowering fold, auto or --pts"),
        (8, GRIDDED, "split", "leaves no conv with an output grid of its own; use 4-bit weights or --pts off"),
        (8, GRIDDED, "auto", "output grid of its own; use 4-bit weights or --pts off for gridded"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_one_that_can(
    bits: int, target: Target, asked: PtsLowering, reason: str
) -> None:
    layer = scaled_layer("Conv", X, None, bits, None, EXPONENT)

    with pytest.raises(TargetError, match=r"^net\.conv2d: ") as caught:
        choose_form(layer, target, asked)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("bits", "asked"), [(4, "fold"), (4, "shift"), (4, "split"), (8, "auto")])
def test_what_was_chosen_is_reported(bits: int, asked: PtsLowering) -> None:
    layer = scaled_layer("MatMul", X, None, bits, None, EXPONENT)

    _, reports = lowered(float_model("MatMul", float_weight("MatMul"), normal(1, 6)), layer, PACKING, asked)

    form = {"split": "split into 3", "auto": "split into 3"}.get(asked, asked)
    assert [note for report in reports for note in report.notes] == [("net.linear", f"power-of-two scaling: {form}")]


# -- storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_targets_that_fold_no_constants_get_plain_integers_and_float_biases(op: str) -> None:
    layer = scaled_layer(op, X, None, 4, TAU, EXPONENT)
    bias = normal(1, len(layer.weight_codes))

    graph, _ = lowered(float_model(op, float_weight(op), bias), layer, find_target("tensorrt"))

    assert not {"Cast", "BitShift"} & set(ops(graph))
    assert ops(graph).count("Mul") == 1  # of the input
    stored = {item.name: item for item in export_model(graph).graph.initializer}
    assert stored[f"{layer.name}.weight_codes"].data_type == TensorProto.INT8
    assert TensorProto.INT32 not in [item.data_type for item in stored.values()]
    assert any(np.array_equal(numpy_helper.to_array(item).reshape(-1), bias) for item in stored.values())


def test_packed_weights_of_a_folded_layer_are_bytes() -> None:
    layer = scaled_layer("Conv", X, None, 4, None, EXPONENT)

    graph, _ = lowered(float_model("Conv", float_weight("Conv"), normal(1, 6)), layer, PACKING, "fold")

    assert "Cast" not in ops(graph)


# -- refusals ------------------------------------------------------------------------------------------


def test_a_layer_without_exponents_cannot_be_split() -> None:
    with pytest.raises(PreconditionError, match=r"net.conv2d: it has no exponents to split by"):
        exponent_parts(scaled_layer("Conv", X, None, 8, TAU, None))


def test_a_second_split_is_refused() -> None:
    layer = scaled_layer("Conv", X, None, 8, None, EXPONENT)
    recipe, graph = recipe_with([layer]), graph_of(float_model("Conv", float_weight("Conv"), normal(1, 6)))
    split = SplitExponents(recipe, frozenset([layer.name]))
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe), split])

    with pytest.raises(PreconditionError, match=r"net.conv2d: no node node_conv2d; run BindRecipe first"):
        run_passes(graph, [split])


def test_an_output_grid_is_refused() -> None:
    layer = scaled_layer("Conv", X, X, 8, None, EXPONENT)
    recipe, graph = recipe_with([layer]), graph_of(float_model("Conv", float_weight("Conv"), normal(1, 6)))
    run_passes(graph, [BindRecipe(recipe), RescaleInputs(recipe)])

    with pytest.raises(PreconditionError, match=r"net.conv2d: its output has a grid, which its parts cannot have"):
        run_passes(graph, [SplitExponents(recipe, frozenset([layer.name]))])


def test_unscaled_weights_of_parts_are_refused() -> None:
    layer = scaled_layer("Conv", X, None, 8, TAU, EXPONENT)
    recipe, graph = recipe_with([layer]), graph_of(float_model("Conv", float_weight("Conv"), normal(1, 6)))
    names = frozenset([layer.name])
    parts = split_recipe(recipe, names)

    with pytest.raises(PostconditionError, match="the recipe's integers are not a rounding of this weight"):
        run_passes(
            graph,
            [BindRecipe(recipe), SplitExponents(recipe, names), InsertQdq(parts, PLAIN), QuantizeWeights(parts, PLAIN)],
        )
