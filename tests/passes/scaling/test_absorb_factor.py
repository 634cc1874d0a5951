"""The law for every producer that takes a factor: the same function, one Mul less."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.factor_graphs import (
    GELU,
    HEADS,
    IMAGE,
    SCALARS,
    TOKENS,
    C,
    Constants,
    L,
    Nodes,
    affine_norm,
    assert_folds,
    fused_qkv,
    image_of,
    linear,
    model_of,
    sliced_norm,
)
from nets.onnx_graphs import normal, with_batch
from nets.toy_nets import merge_heads, node, split_heads
from numpy.typing import NDArray
from onnx import helper

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.attention import Form, LowerAttention
from tfmq_export.passes.lower.group_norm import LowerGroupNorm

factors = st.lists(st.floats(0.02, 50), min_size=C, max_size=C).map(lambda values: np.float32(values))


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
    shape: tuple[int | str, ...] = ("n", C) if norm == "rank 2" else TOKENS
    op = "RMSNormalization" if norm == "RMSNormalization" else "LayerNormalization"
    constants = {"gamma": normal(1, L, C) if norm == "axis 1" else normal(1, C)}
    if norm in ("LayerNormalization", "rank 2", "axis 1"):
        constants["beta"] = normal(2, *constants["gamma"].shape)
    nodes = [node(op, " ".join(["x", *constants]), "normed", axis=1 if norm == "axis 1" else -1)]

    model = model_of(nodes, {"x": shape}, "normed", shape, constants, factor)

    assert_folds(model, {"x": normal(5, *(2 if isinstance(size, str) else size for size in shape))})


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
    nodes = [
        *nodes,
        *(part for name in "qkv" for part in split_heads(name)),
        node("Attention", "q.heads k.heads v.heads", "attention"),
        *merge_heads("attention", "joined"),
    ]
    return nodes, constants | {"split": np.array([-1, L, HEADS, C // HEADS]), "join": np.array([-1, L, C])}


@pytest.mark.parametrize("form", ["matmul", "mha"])
@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_the_values_of_an_attention_take_factors(form: Form, factor: NDArray) -> None:
    nodes, constants = attended(form)
    model = with_batch(model_of(nodes, dict.fromkeys("xqk", TOKENS), "joined", TOKENS, constants, factor))
    feeds = {name: normal(seed, 2, L, C) for seed, name in enumerate("xqk")}

    assert_folds(model, feeds, lambda graph: run_passes(graph, [LowerAttention(form)]))


@pytest.mark.parametrize("cut", ["Split", "Slice"])
@settings(max_examples=10, deadline=None)
@given(factor=factors)
def test_the_values_of_a_fused_projection_take_factors(cut: str, factor: NDArray) -> None:
    nodes, constants = fused_qkv(cut)

    assert_folds(model_of(nodes, {"x": (2, L, C)}, "joined", (2, L, C), constants, factor), {"x": normal(5, 2, L, C)})


def test_slices_that_do_not_overlap_let_a_norm_take_the_factor() -> None:
    model = sliced_norm([node("Slice", "normed two five one", "rest")], "rest", {"five": np.array([5])})

    assert_folds(model, {"x": normal(5, 2, L, C)})


def gated(activation: Nodes) -> tuple[Nodes, Constants]:
    """A gated unit: the first half of a projection times an activation of the second."""
    nodes, constants = linear("projection", "x", out=2 * C)
    split = helper.make_node("Split", ["projection"], ["value", "gate"], name="halves", axis=-1, num_outputs=2)
    return [*nodes, split, *activation, node("Mul", "value active", "gated")], constants


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
