import numpy as np
import onnx
import onnx_graphsurgeon as gs
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.toy_nets import conv_net, node, token_net

from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.bind.fold_constants import FoldConstants


def folded(model: onnx.ModelProto) -> tuple[gs.Graph, PassReport]:
    graph = graph_of(model)
    (report,) = run_passes(graph, [FoldConstants()])
    return graph, report


def test_a_computed_weight_becomes_a_constant() -> None:
    net = conv_net()

    graph, report = folded(net.model)

    assert report.changed == ("node_mean", "node_standardized")
    (conv,) = [item for item in graph.nodes if item.name == "node_conv2d_1"]
    assert isinstance(conv.inputs[1], gs.Constant)
    # Mean over 18 weights around 1, in ORT's order or numpy's: a few units in the last place.
    np.testing.assert_allclose(conv.inputs[1].values, net.layers["conv2d_1"].weight, rtol=0, atol=1e-6)


def test_a_transposed_weight_becomes_a_constant() -> None:
    net = token_net()

    graph, _ = folded(net.model)

    (product,) = [item for item in graph.nodes if item.name == "node_linear.product"]
    np.testing.assert_array_equal(product.inputs[1].values, net.layers["linear"].weight.T)


def test_what_an_input_reaches_is_kept() -> None:
    model = build([node("Relu", "x", "a"), node("Add", "a w", "y")], {"x": (2, 3)}, {"y": (2, 3)}, {"w": normal(0, 3)})

    graph, report = folded(model)

    assert report.changed == ()
    assert ops(graph) == ["Relu", "Add"]


def test_a_dynamic_batch_is_not_frozen() -> None:
    nodes = [node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "zeros"), node("Add", "x zeros", "y")]
    model = build(nodes, {"x": ("n", 3)}, {"y": ("n", 3)})

    graph, _ = folded(model)

    for batch in (1, 4):
        x = normal(batch, batch, 3)
        np.testing.assert_array_equal(infer(graph, {"x": x})[0], x)


@settings(max_examples=15, deadline=None)
@given(depth=st.integers(1, 4), size=st.integers(1, 5))
def test_folding_a_chain_of_constants_keeps_the_function(depth: int, size: int) -> None:
    nodes = [node("Tanh", "w" if i == 0 else f"w{i - 1}", f"w{i}") for i in range(depth)]
    model = build([*nodes, node("Mul", f"x w{depth - 1}", "y")], {"x": (size,)}, {"y": (size,)}, {"w": normal(0, size)})
    x = normal(1, size)

    graph, report = folded(model)

    assert len(report.changed) == depth
    assert ops(graph) == ["Mul"]
    np.testing.assert_array_equal(infer(graph, {"x": x})[0], infer(model, {"x": x})[0])


def test_second_run_changes_nothing() -> None:
    graph, _ = folded(conv_net().model)

    (report,) = run_passes(graph, [FoldConstants()])

    assert report.changed == ()
