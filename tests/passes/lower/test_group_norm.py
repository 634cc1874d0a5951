import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import Shape, assert_computes, build, graph_of, group_norm_model, normal, ops
from onnx import helper

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm
from tfmq_export.passes.lower.group_norm import GroupNormPass, LowerGroupNorm, lower, restored_shape

FORMS = (LowerGroupNorm(), AverageGroupNorm())
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)


def lowered(model: onnx.ModelProto, form: GroupNormPass = FORMS[0]) -> gs.Graph:
    graph = graph_of(model)
    (report,) = run_passes(graph, [form])
    assert report.changed == ("norm",)
    assert report.skipped == ()
    assert "GroupNormalization" not in ops(graph)
    return graph


@every_form
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    epsilon=st.sampled_from([1e-6, 1e-5, 1e-1]),
)
def test_lowered_norm_computes_the_same(
    form: GroupNormPass,
    batch: int,
    groups: int,
    per_group: int,
    spatial: list[int],
    epsilon: float,
) -> None:
    channels = groups * per_group
    model = group_norm_model(["n", channels, *spatial], channels, groups, epsilon)
    x = normal(3, batch, channels, *spatial, mean=1.0)

    graph = lowered(model, form)

    # Both add up in their own order; a multiply-add rounds the mean times the gain once more.
    tolerance = 2e-4 if isinstance(form, LowerGroupNorm) else 1e-3
    # A group of one element is 0/sqrt(eps); rounding of its mean is magnified by 1/sqrt(eps) <= 1e3.
    assert_computes(graph, model, {"x": x}, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "has_shape_node"),
    [
        ((2, 8, 5, 3), False),
        (("n", 8, 5, 3), False),
        (("n", 8, "h", 3), False),
        (("n", 8, "h", "w"), True),
        ((2, 8, "h", "w"), True),
    ],
)
def test_only_two_unknown_dimensions_need_a_shape_node(shape: Shape, has_shape_node: bool) -> None:
    model = group_norm_model(shape, 8, 4)
    x = normal(3, 2, 8, 5, 3)

    graph = lowered(model)

    assert ("Shape" in ops(graph)) is has_shape_node
    assert_computes(graph, model, {"x": x}, rtol=1e-5, atol=1e-5)


def test_batch_stays_dynamic() -> None:
    model = group_norm_model(("n", 8, 4, 4), 8, 4)
    graph = lowered(model)

    for batch in (1, 5):
        x = normal(batch, batch, 8, 4, 4)
        assert_computes(graph, model, {"x": x}, rtol=1e-5, atol=1e-5)


def test_affine_adds_no_epsilon() -> None:
    # With the default epsilon of BatchNormalization, 1e-5, the outputs would shrink by 5e-6.
    graph = lowered(group_norm_model(("n", 8, 4, 4), 8, 4))
    (affine,) = [node for node in graph.nodes if node.op == "BatchNormalization"]

    assert affine.attrs["epsilon"] == 0.0
    assert affine.outputs[0].name == "y"


@every_form
def test_norms_may_share_their_affine(form: GroupNormPass) -> None:
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], "norm_1", num_groups=2),
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["z"], "norm_2", num_groups=4),
    ]
    shape = ("n", 8, 3, 3)
    model = build(nodes, {"x": shape}, {"y": shape, "z": shape}, {"scale": normal(1, 8), "bias": normal(2, 8)})
    x = normal(3, 2, 8, 3, 3)
    graph = graph_of(model)

    (report,) = run_passes(graph, [form])

    assert report.changed == ("norm_1", "norm_2")
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    assert_computes(graph, model, {"x": x}, rtol=1e-5, atol=1e-5)


@every_form
def test_second_run_changes_nothing(form: GroupNormPass) -> None:
    graph = lowered(group_norm_model(("n", 8, 4, 4), 8, 4), form)
    before = ops(graph)

    (report,) = run_passes(graph, [form])

    assert report.changed == report.skipped == ()
    assert ops(graph) == before


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("n", "c", 4, 4), "the number of channels is not static: c"),
        (None, "needs an input [N, C, *spatial], got shape None"),
        (("n", 8), "needs an input [N, C, *spatial], got shape ['n', 8]"),
    ],
)
@every_form
def test_unclear_shapes_are_left_alone_with_a_reason(form: GroupNormPass, shape: Shape, reason: str) -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))
    graph.inputs[0].shape = None if shape is None else list(shape)

    (report,) = run_passes(graph, [form])

    assert report.changed == ()
    assert report.skipped == (("norm", reason),)
    assert ops(graph) == ["GroupNormalization"]


def test_half_precision_is_left_alone() -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))
    graph.inputs[0].dtype = np.dtype(np.float16)

    (report,) = run_passes(graph, [LowerGroupNorm()])

    assert report.skipped == (("norm", "needs float32, got float16, float32, float32"),)


@every_form
def test_one_scale_per_group_is_refused(form: GroupNormPass) -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))
    graph.opset = 18

    with pytest.raises(PreconditionError, match="opset 18 has one scale per group"):
        run_passes(graph, [form])


def test_a_norm_left_behind_breaks_the_promise() -> None:
    graph = graph_of(group_norm_model(("n", 8, 4, 4), 8, 4))

    with pytest.raises(PostconditionError, match="norm: still a GroupNormalization"):
        LowerGroupNorm().ensures(graph)
    lower(graph, graph.nodes[0])
    LowerGroupNorm().ensures(graph.cleanup())


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 8, 4), [0, 8, 4]),
        (("n", 8, 4, 4), [0, 8, 4, 4]),
        (("n", 8, 4, "w"), [0, 8, 4, -1]),
        (("n", 8, "h", "w"), None),
    ],
)
def test_restored_shape(shape: tuple[int | str, ...], sizes: list[int] | None) -> None:
    assert restored_shape(shape) == sizes
