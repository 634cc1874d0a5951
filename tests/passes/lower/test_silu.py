import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import assert_computes, build, graph_of, infer, normal, ops
from onnx import helper

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.silu import LowerSilu

SHAPE = ("n", 8, 3, 3)
AFFINE = {"scale": normal(1, 8), "bias": normal(2, 8)}


def silu(x: str, y: str, *, swapped: bool = False) -> list[onnx.NodeProto]:
    factors = [f"{x}_gate", x] if swapped else [x, f"{x}_gate"]
    return [
        helper.make_node("Sigmoid", [x], [f"{x}_gate"], f"gate_{x}"),
        helper.make_node("Mul", factors, [y], f"silu_{x}"),
    ]


def norm(y: str = "normed", name: str = "norm") -> onnx.NodeProto:
    return helper.make_node("GroupNormalization", ["x", "scale", "bias"], [y], name, num_groups=2)


def lowered(model: onnx.ModelProto, *sites: str) -> gs.Graph:
    graph = graph_of(model)
    for value in graph.tensors().values():
        if value.dtype is None:  # the exporter writes it; inference stops at GroupNormalization
            value.dtype, value.shape = np.dtype(np.float32), list(SHAPE)
    (report,) = run_passes(graph, [LowerSilu()])
    assert report.changed == sites
    return graph


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-120, 120, width=32), min_size=1, max_size=32),
    swapped=st.booleans(),
)
def test_it_is_silu_to_a_rounding_of_its_input(values: list[float], swapped: bool) -> None:
    x = np.float32(values)
    graph = lowered(build(silu("x", "y", swapped=swapped), {"x": ("n",)}, {"y": ("n",)}), "silu_x")

    (actual,) = infer(graph, {"x": x})

    assert ops(graph) == ["Mul", "Tanh", "Mul", "Add"]
    expected = x / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(actual - expected) <= 3e-7 * np.abs(x) + 1e-30).all()  # ORT's tanh is right to two roundings


@pytest.mark.parametrize("op", ["GroupNormalization", "LayerNormalization"])
def test_a_norm_takes_the_half(op: str) -> None:
    options = {"num_groups": 2} if op == "GroupNormalization" else {"axis": -1}
    size = 8 if op == "GroupNormalization" else 3
    affine = {"scale": normal(1, size), "bias": normal(2, size)}
    nodes = [helper.make_node(op, ["x", "scale", "bias"], ["normed"], "norm", **options), *silu("normed", "y")]
    model = build(nodes, {"x": SHAPE}, {"y": SHAPE}, affine)
    x = normal(3, 2, 8, 3, 3)

    graph = lowered(model, "silu_normed")

    assert ops(graph) == [op, "Tanh", "Mul", "Add"]
    for value, before in zip(graph.nodes[0].inputs[1:], affine.values(), strict=True):
        np.testing.assert_array_equal(value.values, before / 2)
    assert_computes(graph, model, {"x": x}, atol=1e-6)


def test_norms_that_share_an_affine_do_not_share_the_half() -> None:
    model = build([norm(), *silu("normed", "y"), norm("z", "other")], {"x": SHAPE}, {"y": SHAPE, "z": SHAPE}, AFFINE)
    x = normal(3, 2, 8, 3, 3)

    graph = lowered(model, "silu_normed")

    assert_computes(graph, model, {"x": x}, atol=1e-6)


def test_a_norm_that_something_else_reads_stays_as_it_is() -> None:
    nodes = [norm(), *silu("normed", "y"), helper.make_node("Relu", ["normed"], ["z"])]
    model = build(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE}, AFFINE)
    x = normal(3, 2, 8, 3, 3)

    graph = lowered(model, "silu_normed")

    assert ops(graph).count("Mul") == 2
    assert_computes(graph, model, {"x": x}, atol=1e-6)


def test_a_sigmoid_that_is_no_silu_is_left_alone() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["plain"]),
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["other", "gate"], ["gated"]),  # a gated unit of two values
        helper.make_node("Sigmoid", ["other"], ["shared"]),
        helper.make_node("Mul", ["other", "shared"], ["y"]),
        helper.make_node("Add", ["shared", "gated"], ["z"]),
    ]
    model = build(nodes, {"x": SHAPE, "other": SHAPE}, {"plain": SHAPE, "y": SHAPE, "z": SHAPE})

    assert sorted(ops(lowered(model))) == sorted(node.op_type for node in model.graph.node)


def test_half_precision_is_left_alone() -> None:
    graph = graph_of(build(silu("x", "y"), {"x": SHAPE}, {"y": SHAPE}))
    graph.tensors()["x_gate"].dtype = np.dtype(np.float16)

    (report,) = run_passes(graph, [LowerSilu()])

    assert report.changed == ()


def test_a_second_run_changes_nothing() -> None:
    graph = lowered(build([norm(), *silu("normed", "y")], {"x": SHAPE}, {"y": SHAPE}, AFFINE), "silu_normed")
    before = ops(graph)

    (report,) = run_passes(graph, [LowerSilu()])

    assert report.changed == ()
    assert ops(graph) == before


def test_a_silu_left_behind_breaks_the_promise() -> None:
    with pytest.raises(PostconditionError, match="silu_x: still a SiLU"):
        LowerSilu().ensures(graph_of(build(silu("x", "y"), {"x": SHAPE}, {"y": SHAPE})))
