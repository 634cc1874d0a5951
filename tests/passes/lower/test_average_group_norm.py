import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import Shape, assert_computes, build, graph_of, group_norm_model, infer, normal, ops
from onnx import helper

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm


def averaged(graph: gs.Graph) -> gs.Graph:
    (report,) = run_passes(graph, [AverageGroupNorm()])
    assert report.changed == ("norm",)
    assert report.skipped == ()
    assert "GroupNormalization" not in ops(graph)
    return graph


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
    assert_computes(graph, model, {"x": x}, rtol=1e-5, atol=1e-5)


def test_a_computed_affine_is_left_alone() -> None:
    nodes = [
        helper.make_node("Abs", ["scale"], ["computed"]),
        helper.make_node("GroupNormalization", ["x", "computed", "bias"], ["y"], "norm", num_groups=2),
    ]
    shape = ("n", 8, 3, 3)
    graph = graph_of(build(nodes, {"x": shape}, {"y": shape}, {"scale": normal(1, 8), "bias": normal(2, 8)}))

    (report,) = run_passes(graph, [AverageGroupNorm()])

    assert report.skipped == (("norm", "its affine computed is computed"),)


def test_a_norm_left_behind_breaks_the_promise() -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))

    with pytest.raises(PostconditionError, match="norm: still a GroupNormalization"):
        AverageGroupNorm().ensures(graph)
