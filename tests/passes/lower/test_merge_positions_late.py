from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import assert_computes, build, graph_of, normal, ops
from onnx import helper

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.merge_positions_late import MergePositionsLate


def tokens_model(
    channels: int = 8,
    positions: Sequence[int | str] = (3, 2),
    *,
    normed: bool = True,
    perm: Sequence[int] = (0, 2, 1),
    to: Sequence[int] | None = None,
    extra: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    nodes = [helper.make_node("Reshape", ["x", "merge"], ["view"], "merge_x")]
    if normed:
        nodes.append(
            helper.make_node("GroupNormalization", ["view", "scale", "bias"], ["norm"], "node_norm", num_groups=2)
        )
    nodes.append(helper.make_node("Transpose", ["norm" if normed else "view"], ["y"], "turn", perm=list(perm)))
    constants = {"merge": np.array(to or [0, channels, -1]), "scale": normal(1, channels), "bias": normal(2, channels)}
    used = constants if normed else {"merge": constants["merge"]}
    outputs = ["y", *(name for node in extra for name in node.output)]
    shapes = dict.fromkeys(outputs, ("n", None, None))
    return build([*nodes, *extra], {"x": ("n", channels, *positions)}, shapes, used)


def rewritten(model: onnx.ModelProto, *sites: str) -> gs.Graph:
    graph = graph_of(model)
    (report,) = run_passes(graph, [MergePositionsLate()])
    assert report.changed == sites
    return graph


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 4, 6]),
    positions=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    normed=st.booleans(),
)
def test_tokens_are_the_same(batch: int, channels: int, positions: list[int], normed: bool) -> None:
    model = tokens_model(channels, positions, normed=normed)
    x = normal(3, batch, channels, *positions, mean=1.0)

    graph = rewritten(model, "turn")

    assert ops(graph) == [*(["GroupNormalization"] if normed else []), "Transpose", "Reshape"]
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    # The norm adds up in an order of its own; without it numbers only move.
    assert_computes(graph, model, {"x": x}, atol=2e-5 * normed)


def test_sizes_may_be_unknown() -> None:
    model = tokens_model(positions=("h", "w"))
    graph = rewritten(model, "turn")

    for positions in ((5, 3), (2, 2)):
        x = normal(3, 2, 8, *positions)
        assert_computes(graph, model, {"x": x}, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tokens_model(perm=(1, 0, 2)), id="batch and channels turned"),
        pytest.param(tokens_model(normed=False, to=[0, 4, -1]), id="channels divided"),
        pytest.param(tokens_model(extra=[helper.make_node("Relu", ["norm"], ["z"])]), id="norm read by another"),
        pytest.param(tokens_model(positions=(6,)), id="nothing to merge"),
    ],
)
def test_anything_else_is_left_alone(model: onnx.ModelProto) -> None:
    assert ops(rewritten(model)) == [node.op_type for node in model.graph.node]


def test_who_else_reads_the_merged_map_keeps_it() -> None:
    model = tokens_model(extra=[helper.make_node("Relu", ["view"], ["z"])])
    x = normal(3, 2, 8, 3, 2)

    graph = rewritten(model, "turn")

    assert ops(graph).count("Reshape") == 2
    assert_computes(graph, model, {"x": x}, atol=1e-5)


def test_a_second_run_changes_nothing() -> None:
    graph = rewritten(tokens_model(), "turn")

    (report,) = run_passes(graph, [MergePositionsLate()])

    assert report.changed == ()


def test_positions_merged_in_front_break_the_promise() -> None:
    with pytest.raises(PostconditionError, match="turn: its positions are still merged in front of it"):
        MergePositionsLate().ensures(graph_of(tokens_model()))
