from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_graphs import Shape, build, graph_of, group_norm_model, infer, normal, ops

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.average_group_norm import AverageGroupNorm
from tfmq_export.passes.base import run_passes


def averaged(graph: gs.Graph) -> gs.Graph:
    (report,) = run_passes(graph, [AverageGroupNorm()])
    assert report.changed == ("norm",)
    assert report.skipped == ()
    assert "GroupNormalization" not in ops(graph)
    return graph


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    epsilon=st.sampled_from([1e-6, 1e-5, 1e-1]),
)
def test_averaged_norm_computes_the_same(
    batch: int, groups: int, per_group: int, spatial: list[int], epsilon: float
) -> None:
    channels = groups * per_group
    model = group_norm_model(["n", channels, *spatial], channels, groups, epsilon)
    x = normal(3, batch, channels, *spatial, mean=1.0)

    graph = averaged(graph_of(model))

    # A group of one element is 0/sqrt(eps); rounding of its mean is magnified by 1/sqrt(eps) <= 1e3.
    np.testing.assert_allclose(infer(graph, {"x": x})[0], infer(model, {"x": x})[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_a_mean_far_from_zero_costs_no_more_than_its_own_rounding(mean: float) -> None:
    # A variance as the difference of two squares would be off by (mean / deviation)^2 roundings.
    model = group_norm_model(("n", 8, 16, 16), 8, 4)
    x = normal(3, 2, 8, 16, 16, mean=mean)

    (actual,) = infer(averaged(graph_of(model)), {"x": x})

    groups = x.astype(np.float64).reshape(2, 4, -1)
    norm = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    expected = norm.reshape(x.shape) * normal(1, 8)[:, None, None] + normal(2, 8)[:, None, None]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 + 1e-6 * mean)


@pytest.mark.parametrize("shape", [("n", 8, 5, 3), ("n", 8, "h", "w"), (2, 8, "h", "w"), ("n", 8, "l")])
def test_batch_and_positions_may_be_unknown(shape: Shape) -> None:
    model = group_norm_model(shape, 8, 4)
    graph = averaged(graph_of(model))

    x = normal(3, 2, 8, *(5, 3)[: len(shape) - 2])
    np.testing.assert_allclose(infer(graph, {"x": x})[0], infer(model, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_norms_may_share_their_affine() -> None:
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], "norm_1", num_groups=2),
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["z"], "norm_2", num_groups=4),
    ]
    shape = ("n", 8, 3, 3)
    model = build(nodes, {"x": shape}, {"y": shape, "z": shape}, {"scale": normal(1, 8), "bias": normal(2, 8)})
    x = normal(3, 2, 8, 3, 3)
    graph = graph_of(model)

    (report,) = run_passes(graph, [AverageGroupNorm()])

    assert report.changed == ("norm_1", "norm_2")
    np.testing.assert_allclose(infer(graph, {"x": x}), infer(model, {"x": x}), rtol=1e-5, atol=1e-5)


def test_second_run_changes_nothing() -> None:
    graph = averaged(graph_of(group_norm_model(("n", 8, 4, 4), 8, 4)))
    before = ops(graph)

    (report,) = run_passes(graph, [AverageGroupNorm()])

    assert report.changed == report.skipped == ()
    assert ops(graph) == before


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("n", "c", 4, 4), "the number of channels is not static: c"),
        (None, "needs an input [N, C, *spatial], got shape None"),
    ],
)
def test_unclear_shapes_are_left_alone_with_a_reason(shape: Sequence[int | str] | None, reason: str) -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))
    graph.inputs[0].shape = None if shape is None else list(shape)

    (report,) = run_passes(graph, [AverageGroupNorm()])

    assert report.changed == ()
    assert report.skipped == (("norm", reason),)


def test_a_computed_affine_is_left_alone() -> None:
    nodes = [
        helper.make_node("Abs", ["scale"], ["computed"]),
        helper.make_node("GroupNormalization", ["x", "computed", "bias"], ["y"], "norm", num_groups=2),
    ]
    shape = ("n", 8, 3, 3)
    graph = graph_of(build(nodes, {"x": shape}, {"y": shape}, {"scale": normal(1, 8), "bias": normal(2, 8)}))

    (report,) = run_passes(graph, [AverageGroupNorm()])

    assert report.skipped == (("norm", "its affine computed is computed"),)


def test_one_scale_per_group_is_refused() -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))
    graph.opset = 18

    with pytest.raises(PreconditionError, match="opset 18 has one scale per group"):
        run_passes(graph, [AverageGroupNorm()])


def test_a_norm_left_behind_breaks_the_promise() -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))

    with pytest.raises(PostconditionError, match="norm: still a GroupNormalization"):
        AverageGroupNorm().ensures(graph)
