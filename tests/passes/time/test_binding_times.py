import numpy as np
import onnx
import pytest
from nets.onnx_graphs import build, graph_of, normal
from nets.toy_nets import conv_net, node
from onnx import TensorProto, helper

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.time.binding_times import BindingTime, binding_times, classify_values, read_by

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


ROLES = {"x": "sample", "t": "timestep", "text": "conditioning", "label": "conditioning"}


def conditioned() -> onnx.ModelProto:
    """A value of every class, and two prompts in one of them."""
    nodes = [
        node("Add", "w w", "weights"),
        node("Mul", "t weights", "time"),
        node("Mul", "text weights", "keys"),
        node("Add", "keys label", "prompts"),
        node("Add", "time label", "both"),
        node("Mul", "x both", "y"),
        node("Shape", "x", "size"),
        node("Expand", "text size", "expanded"),
        node("Add", "y expanded", "z"),
    ]
    return build(nodes, dict.fromkeys(ROLES, (2,)), {"z": (2,)}, {"w": normal(0, 2)})


def test_each_value_binds_at_the_latest_time_of_its_inputs() -> None:
    times = classify_values(graph_of(conditioned()), ROLES)

    assert times["weights"] is BindingTime.WEIGHTS
    assert times["t"] is times["time"] is BindingTime.TIMESTEP
    assert times["text"] is times["keys"] is times["prompts"] is BindingTime.PROMPT
    assert times["both"] is BindingTime.PROMPT_AND_TIMESTEP
    assert times["x"] is times["y"] is times["z"] is BindingTime.SAMPLE


def test_the_size_of_the_sample_is_known_without_the_sample() -> None:
    times = classify_values(graph_of(conditioned()), ROLES)

    assert times["size"] is BindingTime.WEIGHTS
    assert times["expanded"] is BindingTime.PROMPT


@pytest.mark.parametrize("role", [None, "prompt"])
def test_an_input_without_a_role_is_refused(role: str | None) -> None:
    roles = {name: role if name == "label" else value for name, value in ROLES.items()}

    with pytest.raises(PreconditionError, match="input 'label' needs the role sample, timestep or conditioning"):
        classify_values(graph_of(conditioned()), {name: value for name, value in roles.items() if value})
