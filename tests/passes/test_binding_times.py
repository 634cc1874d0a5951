import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx_graphs import build, graph_of, normal
from toy_nets import conv_net, node

from tfmq_export.passes.binding_times import binding_times, read_by

BOTH = frozenset({"sample", "timestep"})
TIME = frozenset({"timestep"})


def test_values_depend_on_what_they_are_computed_from() -> None:
    depends = binding_times(graph_of(conv_net().model))

    assert depends["sample"] == depends["conv2d"] == {"sample"}
    assert depends["timestep"] == depends["angles"] == depends["linear_1"] == TIME
    assert depends["add"] == depends["conv2d_2"] == BOTH
    assert depends["standardized"] == frozenset()


def test_a_shape_query_is_no_dependence() -> None:
    depends = binding_times(graph_of(conv_net().model))

    assert depends["batch"] == frozenset()
    assert depends["expand"] == TIME  # expanded to the batch of the sample


def test_every_output_of_a_node_depends_alike() -> None:
    nodes = [node("Split", "x", "low high", num_outputs=2), node("Mul", "low high", "y")]
    graph = graph_of(build(nodes, {"x": (4,)}, {"y": (2,)}))

    depends = binding_times(graph)

    assert depends["low"] == depends["high"] == {"x"}


def branches(captured: str) -> onnx.ModelProto:
    """``c ? captured : zero``, both read from inside the branches."""
    inner = [
        helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_inside"])],
            f"{name}_branch",
            [],
            [helper.make_tensor_value_info(f"{name}_inside", TensorProto.FLOAT, (3,))],
        )
        for name in (captured, "zero")
    ]
    nodes = [
        node("Cast", "timestep", "late", to=TensorProto.BOOL),
        node("If", "late", "chosen", then_branch=inner[0], else_branch=inner[1]),
    ]
    inputs = {"sample": (3,), "timestep": ()}
    return build(nodes, inputs, {"chosen": (3,)}, {"zero": np.zeros(3, np.float32)})


def test_what_a_branch_captures_is_read_by_its_node() -> None:
    graph = graph_of(branches("sample"))
    (choice,) = [item for item in graph.nodes if item.op == "If"]

    assert {"late", "sample"} <= {value.name for value in read_by(choice)}
    assert binding_times(graph)["chosen"] == BOTH


def test_a_branch_over_constants_depends_on_its_condition_only() -> None:
    assert binding_times(graph_of(branches("zero")))["chosen"] == TIME


def test_constants_depend_on_nothing() -> None:
    graph = graph_of(
        build([node("Add", "w w", "twice"), node("Add", "twice x", "y")], {"x": (2,)}, {"y": (2,)}, {"w": normal(0, 2)})
    )

    assert binding_times(graph)["twice"] == frozenset()
