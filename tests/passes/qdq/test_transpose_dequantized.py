from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.attention_graphs import SCORES, attention_recipe, feeds, quantized_attention
from nets.onnx_graphs import infer

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import constant, export_model
from tfmq_export.passes.qdq.transpose_dequantized import TransposeDequantized
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import find_target

OPENVINO = find_target("openvino")
PATH = "attn[qk]"


def recipe() -> QuantRecipe:
    return adapt(attention_recipe(), OPENVINO)


def keys_of(graph: gs.Graph) -> list[str]:
    """What happens to the keys on their way to the product, its neighbour first."""
    (value,) = [node.inputs[1] for node in graph.nodes if node.name == node_name(SCORES)]
    found = []
    while value.inputs:
        found.append(value.inputs[0].op)
        value = value.inputs[0].inputs[0]
    return found


@pytest.mark.parametrize("integer", [False, True])  # with integers ONNX Runtime moves dequantizers about
def test_keys_are_turned_behind_their_codes_and_nothing_changes(integer: bool) -> None:
    graph = quantized_attention("openvino")
    (expected,) = infer(export_model(graph), feeds(), integer=integer)
    assert keys_of(graph) == ["DequantizeLinear", "QuantizeLinear", "Transpose"]

    (report,) = run_passes(graph, [TransposeDequantized(recipe())])

    assert report.changed == (PATH,)
    assert keys_of(graph) == ["Transpose", "DequantizeLinear", "QuantizeLinear"]
    np.testing.assert_array_equal(infer(export_model(graph), feeds(), integer=integer)[0], expected)


def node_of(graph: gs.Graph, op: str) -> gs.Node:
    """One of the nodes between the keys and their product."""
    (value,) = [node.inputs[1] for node in graph.nodes if node.name == node_name(SCORES)]
    while value.inputs[0].op != op:
        value = value.inputs[0].inputs[0]
    return value.inputs[0]


def other_axes(graph: gs.Graph) -> None:
    node_of(graph, "Transpose").attrs["perm"] = [0, 3, 2, 1]


def another_reader(graph: gs.Graph) -> None:
    turned = node_of(graph, "Transpose").outputs[0]
    copy = gs.Variable("copy", np.float32)
    graph.nodes.append(gs.Node("Identity", "copy", inputs=[turned], outputs=[copy]))
    graph.outputs.append(copy)


def a_zero_point(graph: gs.Graph) -> None:
    for op in ("QuantizeLinear", "DequantizeLinear"):
        node_of(graph, op).inputs[2] = constant(f"{op}.three", np.array(3, np.int8))


def a_scale_per_row(graph: gs.Graph) -> None:
    for op in ("QuantizeLinear", "DequantizeLinear"):
        node = node_of(graph, op)
        node.attrs["axis"] = 2
        node.inputs[1] = constant(f"{op}.rows", np.full(16, 0.1, np.float32))


@pytest.mark.parametrize("spoil", [other_axes, another_reader, a_zero_point, a_scale_per_row])
def test_what_does_not_commute_is_left_alone(spoil: Callable[[gs.Graph], None]) -> None:
    graph = quantized_attention("openvino")
    spoil(graph)

    (report,) = run_passes(graph, [TransposeDequantized(recipe())])

    assert report.changed == ()


def test_a_second_run_changes_nothing() -> None:
    graph = quantized_attention("openvino")
    run_passes(graph, [TransposeDequantized(recipe())])

    (report,) = run_passes(graph, [TransposeDequantized(recipe())])

    assert report.changed == ()


def test_keys_turned_in_front_break_the_promise() -> None:
    message = r"attn\[qk\]: its second factor is still turned in front of its quantizer"
    with pytest.raises(PostconditionError, match=message):
        TransposeDequantized(recipe()).ensures(quantized_attention("openvino"))
