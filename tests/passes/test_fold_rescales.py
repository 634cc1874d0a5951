"""Factors that move into what computes a value: the law for every producer, and what stops them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_graphs import Shape, build, graph_of, infer, normal, ops
from toy_nets import activation_grid, layer_recipe, node, recipe_for, recipe_with, vector_net

from tfmq_export.bundle import LayerInfo
from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.bind_recipe import BindRecipe
from tfmq_export.passes.fold_rescales import FoldRescales
from tfmq_export.passes.graph import export_model, save_model
from tfmq_export.passes.insert_qdq import InsertQdq
from tfmq_export.passes.lower_attention import Form, LowerAttention
from tfmq_export.passes.lower_group_norm import LowerGroupNorm
from tfmq_export.passes.quantize_weights import QuantizeWeights
from tfmq_export.passes.rescale_inputs import RescaleInputs
from tfmq_export.recipe import LayerRecipe
from tfmq_export.runtime.realized import realized_on_ort
from tfmq_export.target import find_target

C, L, HEADS = 6, 5, 2
Nodes = Sequence[onnx.NodeProto]
Constants = dict[str, NDArray]


def model_of(  # noqa: PLR0913
    nodes: Nodes,
    inputs: dict[str, Shape],
    source: str,
    shape: Shape,
    constants: Constants,
    factor: NDArray,
    normed: Shape = None,
) -> onnx.ModelProto:
    """``y = source * factor``, the Mul named as ``RescaleInputs`` names it.

    Args:
        normed: Shape of the value "normed", where ``shape`` is another: inference does not know every norm's.
    """
    rescale = helper.make_node("Mul", [source, "factor"], ["rescaled"], name=f"{source}.rescale")
    model = build(
        [*nodes, rescale, node("Identity", "rescaled", "y")], inputs, {"y": shape}, constants | {"factor": factor}
    )
    known = {info.name for info in (*model.graph.value_info, *model.graph.input)}
    for name, own in {"normed": normed or shape, source: shape}.items():
        if name not in known and any(name in item.output for item in nodes):
            model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, own))
    return onnx.shape_inference.infer_shapes(model)


def folded(graph: gs.Graph) -> tuple[gs.Graph, PassReport]:
    (report,) = run_passes(graph, [FoldRescales(recipe_with([]))])
    return graph, report


def assert_folds(model: onnx.ModelProto, feeds: dict[str, NDArray], before: Callable[[gs.Graph], object] = id) -> None:
    graph = graph_of(model)
    before(graph)
    expected = infer(export_model(graph), feeds)
    muls = ops(graph).count("Mul")

    graph, report = folded(graph)

    assert len(report.changed) == 1, report.skipped
    assert ops(graph).count("Mul") == muls - 1
    # The factor is rounded into constants instead of results, and sums of at most 54 terms differ in order.
    for actual, wanted in zip(infer(export_model(graph), feeds), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(actual).max() > 0
    (again,) = run_passes(graph, [FoldRescales(recipe_with([]))])
    assert again.changed == again.skipped == ()


factors = st.lists(st.floats(0.02, 50), min_size=C, max_size=C).map(lambda values: np.float32(values))
FACTOR = np.float32([0.5, 2, 4, 0.25, 3, 0.1])
IMAGE = ("n", C, 4, 3)
TOKENS = ("n", L, C)


def image_of(factor: NDArray) -> NDArray:
    return factor.reshape(-1, 1, 1)


def affine_norm(op: str, **attributes: object) -> tuple[Nodes, Constants]:
    names = "x gamma beta" + (" mean variance" if op == "BatchNormalization" else "")
    constants = {"gamma": normal(1, C), "beta": normal(2, C)}
    if op == "BatchNormalization":
        constants |= {"mean": normal(3, C), "variance": np.square(normal(4, C)) + np.float32(0.1)}
    return [node(op, names, "normed", **attributes)], constants


@settings(max_examples=25, deadline=None)
@given(
    factor=factors,
    norm=st.sampled_from(["BatchNormalization", "InstanceNormalization", "GroupNormalization"]),
    relu=st.booleans(),
    lowered=st.booleans(),
)
def test_norms_of_images_take_factors(factor: NDArray, norm: str, relu: bool, lowered: bool) -> None:
    nodes, constants = affine_norm(norm, **({"num_groups": 2} if norm == "GroupNormalization" else {}))
    if relu:
        nodes = [*nodes, node("Relu", "normed", "relu")]
    model = model_of(nodes, {"x": IMAGE}, "relu" if relu else "normed", IMAGE, constants, image_of(factor))

    before = (lambda graph: run_passes(graph, [LowerGroupNorm()])) if lowered else id
    assert_folds(model, {"x": normal(5, 2, C, 4, 3)}, before)


@settings(max_examples=25, deadline=None)
@given(factor=factors, norm=st.sampled_from(["LayerNormalization", "no bias", "RMSNormalization", "rank 2", "axis 1"]))
def test_norms_of_tokens_take_factors(factor: NDArray, norm: str) -> None:
    shape: tuple[object, ...] = ("n", C) if norm == "rank 2" else TOKENS
    op = "RMSNormalization" if norm == "RMSNormalization" else "LayerNormalization"
    constants = {"gamma": normal(1, L, C) if norm == "axis 1" else normal(1, C)}
    if norm in ("LayerNormalization", "rank 2", "axis 1"):
        constants["beta"] = normal(2, *constants["gamma"].shape)
    nodes = [node(op, " ".join(["x", *constants]), "normed", axis=1 if norm == "axis 1" else -1)]

    model = model_of(nodes, {"x": shape}, "normed", shape, constants, factor)  # type: ignore[arg-type]

    assert_folds(model, {"x": normal(5, *(2 if size == "n" else size for size in shape))})  # type: ignore[misc]


@settings(max_examples=15, deadline=None)
@given(factor=factors)
def test_a_group_norm_of_an_image_read_as_tokens_takes_factors(factor: NDArray) -> None:
    nodes, constants = affine_norm("GroupNormalization", num_groups=3)
    nodes = [
        *nodes,
        node("Reshape", "normed flat", "rows"),
        node("Transpose", "rows", "tokens", perm=[0, 2, 1]),
    ]
    constants |= {"flat": np.array([-1, C, 12])}
    model = model_of(nodes, {"x": IMAGE}, "tokens", ("n", 12, C), constants, factor, IMAGE)

    assert_folds(model, {"x": normal(5, 2, C, 4, 3)}, lambda graph: run_passes(graph, [LowerGroupNorm()]))


@settings(max_examples=15, deadline=None)
@given(factor=factors, op=st.sampled_from(["Add", "Sub"]), swapped=st.booleans(), divided=st.booleans())
def test_an_affine_by_constants_takes_factors(factor: NDArray, op: str, swapped: bool, divided: bool) -> None:
    nodes = [
        node("Mul", "gain x" if swapped else "x gain", "scaled"),
        node(op, "shift scaled" if swapped else "scaled shift", "shifted"),
        *([node("Div", "shifted spread", "divided")] if divided else []),
    ]
    constants = {"gain": normal(1, C, 1, 1), "shift": normal(2, C, 1, 1)}
    constants |= {"spread": np.abs(normal(3, C, 1, 1)) + np.float32(0.5)} if divided else {}
    source = "divided" if divided else "shifted"

    assert_folds(
        model_of(nodes, {"x": IMAGE}, source, IMAGE, constants, image_of(factor)), {"x": normal(5, 2, C, 4, 3)}
    )


def linear(name: str, source: str, out: int = C, fan_in: int = C, seed: int = 1) -> tuple[Nodes, Constants]:
    nodes = [node("MatMul", f"{source} {name}.w", f"{name}.product"), node("Add", f"{name}.product {name}.b", name)]
    return nodes, {f"{name}.w": normal(seed, fan_in, out), f"{name}.b": normal(seed + 50, out)}


@settings(max_examples=20, deadline=None)
@given(
    factor=factors,
    group=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_convolutions_take_factors_on_their_outputs(
    factor: NDArray, group: int, kernel: int, stride: int, pads: list[int], bias: bool
) -> None:
    constants = {"w": normal(1, C, 4 // group, kernel, kernel)} | ({"b": normal(2, C)} if bias else {})
    nodes = [node("Conv", " ".join(["x", *constants]), "conv", group=group, strides=[stride] * 2, pads=pads)]
    model = model_of(nodes, {"x": ("n", 4, 5, 6)}, "conv", ("n", C, "h", "w"), constants, image_of(factor))

    assert_folds(model, {"x": normal(5, 2, 4, 5, 6)})


@settings(max_examples=20, deadline=None)
@given(factor=factors, op=st.sampled_from(["MatMul", "MatMul and Add", "Gemm", "Gemm transposed", "Gemm without bias"]))
def test_linear_layers_take_factors_on_their_outputs(factor: NDArray, op: str) -> None:
    shape, rows = (("n", C), (2, 4)) if op.startswith("Gemm") else (TOKENS, (2, L, 4))
    inputs = {"x": ("n", *rows[1:])}
    if op.startswith("Gemm"):
        transposed = op == "Gemm transposed"
        constants = {"w": normal(1, C, 4) if transposed else normal(1, 4, C)}
        constants |= {} if "without" in op else {"b": normal(2, C)}
        nodes: Nodes = [node("Gemm", " ".join(["x", *constants]), "linear", transB=int(transposed))]
    else:
        nodes, constants = linear("linear", "x", fan_in=4)
        if op == "MatMul":
            nodes, constants = [node("MatMul", "x linear.w", "linear")], {"linear.w": constants["linear.w"]}

    assert_folds(model_of(nodes, inputs, "linear", shape, constants, factor), {"x": normal(5, *rows)})


def attended(form: Form | None) -> tuple[Nodes, Constants]:
    """v is a projection; q and k are inputs."""
    nodes, constants = linear("v", "x")
    heads = [
        part
        for name in ("q", "k", "v")
        for part in (
            node("Reshape", f"{name} split", f"{name}.split"),
            node("Transpose", f"{name}.split", f"{name}.heads", perm=[0, 2, 1, 3]),
        )
    ]
    nodes = [
        *nodes,
        *heads,
        node("Attention", "q.heads k.heads v.heads", "attention"),
        node("Transpose", "attention", "merged", perm=[0, 2, 1, 3]),
        node("Reshape", "merged join", "joined"),
    ]
    return nodes, constants | {"split": np.array([-1, L, HEADS, C // HEADS]), "join": np.array([-1, L, C])}


def batched(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name the batch dimension, as the exporter does; inference cannot see through Reshape to -1."""
    for info in model.graph.value_info:
        info.type.tensor_type.shape.dim[0].dim_param = "n"
    return model


@pytest.mark.parametrize("form", ["matmul", "mha"])
@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_the_values_of_an_attention_take_factors(form: Form, factor: NDArray) -> None:
    nodes, constants = attended(form)
    model = batched(model_of(nodes, dict.fromkeys("xqk", TOKENS), "joined", TOKENS, constants, factor))
    feeds = {name: normal(seed, 2, L, C) for seed, name in enumerate("xqk")}

    assert_folds(model, feeds, lambda graph: run_passes(graph, [LowerAttention(form)]))


def fused_qkv(cut: str) -> tuple[Nodes, Constants]:
    """One projection for q, k and v, [B, L, 3, H, D], cut into three."""
    nodes, constants = linear("qkv", "x", out=3 * C)
    nodes = [
        *nodes,
        node("Reshape", "qkv apart", "stacked"),
        node("Transpose", "stacked", "heads", perm=[2, 0, 3, 1, 4]),
    ]
    names = ("q", "k", "v")
    if cut == "Split":
        parts = " ".join(f"{name}.part" for name in names)
        nodes.append(helper.make_node("Split", ["heads"], parts.split(), name="cut", axis=0, num_outputs=3))
    for index, name in enumerate(names):
        if cut == "Slice":
            nodes.append(node("Slice", f"heads at{index} at{index + 1} zero", f"{name}.part"))
        nodes.append(node("Squeeze", f"{name}.part zero", f"{name}.heads"))
    nodes += [
        node("Transpose", "k.heads", "k.turned", perm=[0, 1, 3, 2]),
        node("MatMul", "q.heads k.turned", "scores"),
        node("Softmax", "scores", "weights", axis=-1),
        node("MatMul", "weights v.heads", "attention"),
        node("Transpose", "attention", "merged", perm=[0, 2, 1, 3]),
        node("Reshape", "merged join", "joined"),
    ]
    constants |= {"apart": np.array([2, L, 3, HEADS, C // HEADS]), "join": np.array([2, L, C]), "zero": np.array([0])}
    return nodes, constants | {f"at{index}": np.array([index]) for index in range(4)}


@pytest.mark.parametrize("cut", ["Split", "Slice"])
@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_the_values_of_a_fused_projection_take_factors(cut: str, factor: NDArray) -> None:
    nodes, constants = fused_qkv(cut)

    assert_folds(model_of(nodes, {"x": (2, L, C)}, "joined", (2, L, C), constants, factor), {"x": normal(5, 2, L, C)})


def test_slices_that_overlap_keep_the_factor() -> None:
    nodes, constants = fused_qkv("Slice")
    constants["at1"] = np.array([3])  # q takes all three parts; k none
    nodes = [item for item in nodes if not item.name.startswith(("node_k", "node_scores", "node_weights"))]
    nodes = [item for item in nodes if item.name not in ("node_q.heads", "node_attention", "node_merged")]
    nodes = [item for item in nodes if item.name != "node_joined"]
    model = model_of(nodes, {"x": (2, L, C)}, "v.heads", (2, HEADS, L, C // HEADS), constants, np.float32([1, 2, 3]))
    model.graph.output.append(helper.make_tensor_value_info("q.part", onnx.TensorProto.FLOAT, None))

    assert_stays(model, "heads has another reader of what node_v.part takes")


def sliced_norm(other: Nodes, output: str, constants: Constants | None = None) -> onnx.ModelProto:
    """The first half of a norm's tokens takes a factor; something else reads the norm as well."""
    shape = ("n", 2, C)
    norm = [node("LayerNormalization", "x gamma", "normed"), node("Slice", "normed zero two one", "half")]
    own = {"gamma": normal(1, L, C), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    norm[0].attribute.append(helper.make_attribute("axis", 1))
    everything = own | (constants or {})
    model = model_of([*norm, *other], {"x": TOKENS}, "half", shape, everything, FACTOR, TOKENS)
    model.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return model


def test_slices_that_do_not_overlap_let_a_norm_take_the_factor() -> None:
    model = sliced_norm([node("Slice", "normed two five one", "rest")], "rest", {"five": np.array([5])})

    assert_folds(model, {"x": normal(5, 2, L, C)})


@pytest.mark.parametrize(
    ("other", "output", "reason"),
    [
        (
            [node("Slice", "normed two five channels", "rest")],
            "rest",
            "normed has another reader of what node_half takes",
        ),
        ([node("Relu", "normed", "rest")], "rest", "normed has another reader, or one that is no slice along one axis"),
        ([], "normed", "normed has another reader"),
    ],
)
def test_readers_of_more_than_another_part_keep_the_factor(other: Nodes, output: str, reason: str) -> None:
    constants = {"five": np.array([5]), "channels": np.array([2])} if other else {}

    assert_stays(sliced_norm(other, output, constants), reason)


def test_an_attention_with_a_bias_of_its_own_keeps_the_factor() -> None:
    nodes, constants = linear("v", "x")
    mha = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "bias"], ["joined"], "mha", domain="com.microsoft", num_heads=HEADS
    )
    constants |= {"bias": normal(9, 3 * C)}
    model = model_of([*nodes, mha], dict.fromkeys("xqk", TOKENS), "joined", TOKENS, constants, FACTOR)

    assert_stays(model, "mha has packed or past values, or a bias of its own")


def test_a_weight_with_a_scale_per_input_channel_keeps_the_factor() -> None:
    constants = {"codes": np.int8(normal(1, C, C) * 40), "scale": np.exp(normal(2, C)), "zero": np.zeros(C, np.int8)}
    nodes = [node("DequantizeLinear", "codes scale zero", "w", axis=0), node("MatMul", "x w", "product")]

    model = model_of(nodes, {"x": TOKENS}, "product", TOKENS, constants, FACTOR)

    assert_stays(model, "the weight of node_product has no scale per output channel")


def gated(activation: Nodes) -> tuple[Nodes, Constants]:
    """A gated unit: the first half of a projection times an activation of the second."""
    nodes, constants = linear("projection", "x", out=2 * C)
    split = helper.make_node("Split", ["projection"], ["value", "gate"], name="halves", axis=-1, num_outputs=2)
    return [*nodes, split, *activation, node("Mul", "value active", "gated")], constants


GELU = [
    node("Div", "gate root_2", "normal"),
    node("Erf", "normal", "erf"),
    node("Add", "erf one", "tail"),
    node("Mul", "gate tail", "doubled"),
    node("Mul", "doubled half", "active"),
]
SCALARS = {"root_2": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}


@pytest.mark.parametrize("activation", [[node("Gelu", "gate", "active")], GELU, [node("Sigmoid", "gate", "active")]])
@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_the_linear_half_of_a_gated_unit_takes_factors(activation: Nodes, factor: NDArray) -> None:
    nodes, constants = gated(activation)
    constants |= SCALARS if activation is GELU else {}

    assert_folds(model_of(nodes, {"x": TOKENS}, "gated", TOKENS, constants, factor), {"x": normal(5, 2, L, C)})


@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_an_adaptive_norm_takes_factors_in_the_norm_and_in_what_computes_the_shift(factor: NDArray) -> None:
    modulation, constants = linear("modulation", "c", out=2 * C)
    nodes = [
        *modulation,
        helper.make_node("Split", ["modulation"], ["scale", "shift"], name="chunk", axis=1, num_outputs=2),
        node("Unsqueeze", "scale one", "scale.tokens"),
        node("Unsqueeze", "shift one", "shift.tokens"),
        node("Add", "scale.tokens unit", "gain"),
        node("LayerNormalization", "x gamma", "normed"),
        node("Mul", "normed gain", "scaled"),
        node("Add", "scaled shift.tokens", "modulated"),
    ]
    constants |= {"one": np.array([1]), "unit": np.float32(1), "gamma": np.ones(C, np.float32)}
    model = model_of(nodes, {"x": TOKENS, "c": ("n", C)}, "modulated", TOKENS, constants, factor)

    assert_folds(model, {"x": normal(5, 2, L, C), "c": normal(6, 2, C)})


# -- layers of the recipe --------------------------------------------------------------------------------


def two_layers(op: str) -> tuple[onnx.ModelProto, tuple[LayerRecipe, LayerRecipe]]:
    """A layer and, behind a Relu, a scaled one."""
    weights = normal(1, C, 4), normal(2, 3, C)
    tau = np.float32([0.5, 3.1, 0.27, 1.9, 0.7, 1.1])
    shape: Shape = ("n", 4) if op == "Gemm" else ("n", L, 4)
    grid = activation_grid(np.float32([-4, 4]))
    first = layer_recipe("linear", "linear", weights[0], grid, bits=4)
    wide = activation_grid(np.float32([0, 60]))
    second = replace(layer_recipe("linear_1", "linear", weights[1] * tau, wide), les_scale=tau)
    if op == "Gemm":
        nodes = [node("Gemm", "x w b", "linear", transB=1), node("Relu", "linear", "relu")]
        nodes.append(node("Gemm", "relu w1 b1", "linear_1", transB=1))
    else:
        nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear"), node("Relu", "linear", "relu")]
        nodes += [node("MatMul", "relu w1", "product_1"), node("Add", "product_1 b1", "linear_1")]
        weights = weights[0].T.copy(), weights[1].T.copy()
    constants = {"w": weights[0], "b": normal(3, C), "w1": weights[1], "b1": normal(4, 3)}
    model = build(nodes, {"x": shape}, {"linear_1": (*shape[:-1], 3)}, constants)  # type: ignore[index]
    return model, (first, second)


def quantized(model: onnx.ModelProto, layers: Sequence[LayerRecipe]) -> gs.Graph:
    recipe, graph = recipe_with(layers), graph_of(model)
    ort_cpu = find_target("ort-cpu")
    before = [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ort_cpu)]
    run_passes(graph, [*before, QuantizeWeights(recipe, ort_cpu)])
    return graph


def stored(graph: gs.Graph) -> dict[str, NDArray]:
    return {item.name: numpy_helper.to_array(item) for item in export_model(graph).graph.initializer}


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_quantized_layer_keeps_its_integers_and_its_kernel(op: str, tmp_path: Path) -> None:
    model, layers = two_layers(op)
    before, graph = quantized(model, layers), quantized(model, layers)

    (report,) = run_passes(graph, [FoldRescales(recipe_with(layers))])

    assert report.changed == ("relu.rescale",)
    old, new = stored(before), stored(graph)
    np.testing.assert_array_equal(new["linear.weight_codes"], old["linear.weight_codes"])
    factor = layers[1].input_factor
    np.testing.assert_array_equal(new["linear.weight_scale"], old["linear.weight_scale"] * factor)
    if op == "Gemm":
        np.testing.assert_array_equal(new["linear.bias_codes"], old["linear.bias_codes"])
        step = layers[0].input.scale * new["linear.weight_scale"]  # exactly, or the kernel is a float one
        np.testing.assert_array_equal(new["linear.bias_scale"], step)
    x = normal(5, *((7, 4) if op == "Gemm" else (7, L, 4)))
    results = [infer(export_model(item), {"x": x})[0] for item in (before, graph)]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)
    save_model(export_model(graph), tmp_path / "model.onnx")
    asked = [LayerInfo(x.name, x.path, x.kind, x.macs, x.weight.spec.bits, 8) for x in layers]
    realized_on_ort(tmp_path / "model.onnx", asked).raise_if_lost()


def test_a_value_that_carries_a_factor_has_another_name() -> None:
    model, layers = two_layers("MatMul")
    graph = quantized(model, layers)

    run_passes(graph, [FoldRescales(recipe_with(layers))])

    assert {"linear.scaled", "linear_1"} <= set(graph.tensors())
    assert "linear" not in graph.tensors()


def test_a_layer_whose_output_has_a_grid_cannot_take_a_factor() -> None:
    model, (first, second) = two_layers("Gemm")
    graph = quantized(model, [replace(first, output=activation_grid(np.float32([-9, 9]))), second])

    (report,) = run_passes(graph, [FoldRescales(recipe_with([first, second]))])

    assert report.skipped == (("relu.rescale", "linear is quantized"),)


# -- refusals ------------------------------------------------------------------------------------------


def assert_stays(model: onnx.ModelProto, reason: str) -> None:
    graph = graph_of(model).cleanup().toposort()
    before = export_model(graph).SerializeToString(deterministic=True)

    graph, report = folded(graph)

    assert report.changed == ()
    assert {why for _, why in report.skipped} == {reason}
    assert export_model(graph).SerializeToString(deterministic=True) == before


def behind_norm(nodes: Nodes, source: str, constants: Constants | None = None) -> onnx.ModelProto:
    """A LayerNormalization, some nodes behind it, and the factor."""
    norm = node("LayerNormalization", "x gamma beta", "normed")
    own = {"gamma": normal(1, C), "beta": normal(2, C)}
    return model_of([norm, *nodes], {"x": TOKENS}, source, TOKENS, own | (constants or {}), FACTOR)


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax", "Gelu", "Tanh", "Exp"])
def test_no_factor_crosses_an_activation(op: str) -> None:
    assert_stays(behind_norm([node(op, "normed", "active")], "active"), f"active comes from {op}")


def test_no_factor_crosses_silu() -> None:
    nodes = [node("Sigmoid", "normed", "gate"), node("Mul", "normed gate", "silu")]

    assert_stays(behind_norm(nodes, "silu"), "normed has another reader and gate comes from Sigmoid")


def test_no_factor_crosses_gelu_or_touches_its_constants() -> None:
    renamed = [helper.make_node(x.op_type, [("normed" if i == "gate" else i) for i in x.input], x.output) for x in GELU]

    assert_stays(behind_norm(renamed, "active", SCALARS), "normed has another reader and erf comes from Erf")


def test_a_second_reader_keeps_the_factor() -> None:
    model = behind_norm([node("Relu", "normed", "other")], "normed")
    model.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_an_output_of_the_graph_keeps_the_factor() -> None:
    model = behind_norm([], "normed")
    model.graph.output.append(helper.make_tensor_value_info("normed", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_other_factors_on_one_value_all_stay() -> None:
    # q, k and v, each with a tau of its own.
    model = behind_norm([node("Mul", "normed other", "z")], "normed", {"other": FACTOR[::-1].copy()})
    model.graph.node[1].name = "normed.1.rescale"
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_an_input_of_the_graph_cannot_take_a_factor() -> None:
    assert_stays(model_of([], {"x": TOKENS}, "x", TOKENS, {}, FACTOR), "x is an input of the graph")


def test_a_quantized_value_cannot_take_a_factor() -> None:
    grid = {"scale": np.float32(0.1), "zero": np.uint8(128)}
    nodes = [node("QuantizeLinear", "normed scale zero", "codes"), node("DequantizeLinear", "codes scale zero", "real")]

    assert_stays(behind_norm(nodes, "real", grid), "real is quantized")


def test_a_computed_affine_cannot_take_a_factor() -> None:
    nodes = [node("Relu", "g", "gamma"), node("LayerNormalization", "x gamma", "normed")]

    assert_stays(
        model_of(nodes, {"x": TOKENS}, "normed", TOKENS, {"g": normal(1, C)}, FACTOR),
        "the affine of node_normed is computed",
    )


def test_a_value_broadcast_over_the_channels_cannot_take_a_factor() -> None:
    nodes = [node("Add", "x c", "sum")]
    inputs = {"x": TOKENS, "c": ("n", L, 1)}

    reason = "x is an input of the graph"
    assert_stays(model_of(nodes, inputs, "sum", TOKENS, {}, FACTOR), reason)
    nodes = [node("LayerNormalization", "x gamma", "normed"), node("Add", "normed c", "sum")]
    model = model_of(nodes, inputs, "sum", TOKENS, {"gamma": normal(1, C)}, FACTOR)
    assert_stays(model, "c is broadcast over the channels")


def test_queries_cannot_take_a_factor_of_the_scores() -> None:
    nodes = [*linear("q", "x")[0], node("Transpose", "k", "turned", perm=[0, 2, 1]), node("MatMul", "q turned", "s")]
    model = model_of(nodes, {"x": (2, C, C), "k": (2, C, C)}, "s", (2, C, C), linear("q", "x")[1], FACTOR)

    assert_stays(model, "k is an input of the graph")  # a factor of the scores' columns is one of k's rows


def test_channels_lost_in_a_reshape_keep_the_factor() -> None:
    nodes, constants = affine_norm("GroupNormalization", num_groups=2)
    nodes = [*nodes, node("Reshape", "normed mixed", "tokens")]
    constants |= {"mixed": np.array([2, 12, C])}  # rows of the image, not its channels

    model = model_of(nodes, {"x": (2, C, 4, 3)}, "tokens", (2, 12, C), constants, FACTOR, (2, C, 4, 3))

    assert_stays(model, "the factor is not per channel of normed")


def test_a_relu_that_is_not_quantized_keeps_the_factor_in_front_of_it() -> None:
    model = behind_norm([], "normed")
    model.graph.node[-1].op_type = "Relu"

    assert_stays(model, "node_y is not quantized next")


def test_float_weights_are_refused() -> None:
    net = vector_net()
    recipe, graph = recipe_for(net), graph_of(net.model)
    run_passes(graph, [BindRecipe(recipe)])

    with pytest.raises(PreconditionError, match=r"net.linear: its weight is not quantized; run QuantizeWeights first"):
        run_passes(graph, [FoldRescales(recipe)])


def test_who_shares_a_constant_keeps_it() -> None:
    model = behind_norm([node("LayerNormalization", "x gamma beta", "other", epsilon=1.0)], "normed")
    model.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, TOKENS))
    feeds = {"x": normal(5, 2, L, C)}

    graph, report = folded(graph_of(model))

    assert report.changed == ("normed.rescale",)
    for actual, expected in zip(infer(export_model(graph), feeds), infer(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
