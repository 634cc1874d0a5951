import numpy as np
import pytest
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import node

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.finish.name_outputs import NameOutputs

SHAPE = (2, 3)


def test_the_output_takes_its_public_name() -> None:
    graph = graph_of(build([node("Relu", "x", "conv2d_7")], {"x": SHAPE}, {"conv2d_7": SHAPE}))

    (report,) = run_passes(graph, [NameOutputs("out_sample")])

    assert report.changed == ("conv2d_7 -> out_sample",)
    assert [value.name for value in graph.outputs] == ["out_sample"]


def test_nodes_that_read_the_output_follow_the_name() -> None:
    nodes = [node("Relu", "x", "y"), node("Neg", "y", "z")]
    model = build(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE})
    graph = graph_of(model)
    graph.outputs = graph.outputs[1:]
    x = normal(0, *SHAPE)

    run_passes(graph, [NameOutputs("out_sample")])

    np.testing.assert_array_equal(infer(graph, {"x": x})[0], -np.maximum(x, 0))


def test_the_right_name_is_no_change() -> None:
    graph = graph_of(build([node("Relu", "x", "out_sample")], {"x": SHAPE}, {"out_sample": SHAPE}))

    (report,) = run_passes(graph, [NameOutputs("out_sample")])

    assert report.changed == ()


def test_two_outputs_are_refused() -> None:
    nodes = [node("Relu", "x", "y"), node("Neg", "x", "z")]
    graph = graph_of(build(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE}))

    with pytest.raises(PreconditionError, match="expected one output, the graph has 2"):
        run_passes(graph, [NameOutputs("out_sample")])
