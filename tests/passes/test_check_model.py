"""The whole list of passes: what its last one refuses, and which kernels ONNX Runtime then runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import graph_of
from nets.toy_nets import Net, conv_net, token_net, vector_net
from nets.toy_recipes import recipe_for

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import PostconditionError, PrecisionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.target import Target, find_target

TARGET = find_target("ort-cpu")


def compiled(net: Net, recipe: QuantRecipe) -> gs.Graph:
    graph = graph_of(net.model)
    run_passes(graph, passes_for(recipe, TARGET, sample="sample", timestep="timestep"))
    return graph


def asked(recipe: QuantRecipe) -> list[LayerInfo]:
    return [LayerInfo(x.name, x.path, x.kind, x.macs, x.weight.spec.bits, x.input.spec.bits) for x in recipe.layers]


def remove_output_grid(graph: gs.Graph, layer: str = "conv2d") -> None:
    """Readers of the layer read its float result."""
    (multiplier,) = [item for item in graph.nodes if item.name == node_name(layer)]
    (quantize,) = multiplier.outputs[0].outputs
    (dequantized,) = quantize.outputs[0].outputs[0].outputs
    for reader in list(dequantized.outputs):
        reader.inputs = [multiplier.outputs[0] if value is dequantized else value for value in reader.inputs]
    graph.cleanup().toposort()


@pytest.mark.parametrize("widths", [(8, 8), (4, 8), (8, 6), (4, 6)])
@pytest.mark.parametrize(
    ("make", "kernel"),
    [(conv_net, "QLinearConv"), (token_net, "MatMulIntegerToFloat"), (vector_net, "QGemm")],
)
def test_every_layer_runs_in_integers(
    tmp_path: Path, make: Callable[[], Net], kernel: str, widths: tuple[int, int]
) -> None:
    net = make()
    recipe = recipe_for(net, *widths)
    save_graph(compiled(net, recipe), tmp_path / "model.onnx")

    receipt = realized_on_ort(tmp_path / "model.onnx", asked(recipe))

    receipt.raise_if_lost()
    assert {row.layer.name: row.realized for row in receipt.rows} == dict.fromkeys(net.layers, (kernel,))
    assert receipt.integer_share == 1.0


def test_without_its_output_grid_a_convolution_is_refused(tmp_path: Path) -> None:
    net = conv_net()
    recipe = recipe_for(net)
    graph = compiled(net, recipe)
    remove_output_grid(graph)

    with pytest.raises(PostconditionError, match=r"net.conv2d: ort-cpu needs QuantizeLinear on its output"):
        run_passes(graph, [CheckModel(recipe, TARGET, "timestep")])
    # And rightly so: this is what ONNX Runtime would make of it, without a word.
    save_graph(graph, tmp_path / "model.onnx")
    with pytest.raises(PrecisionError, match=r"net.conv2d: runs as .*Conv in float"):
        realized_on_ort(tmp_path / "model.onnx", asked(recipe)).raise_if_lost()


def test_a_domain_the_exporter_did_not_import_is_declared() -> None:
    net = token_net()
    del net.model.opset_import[1:]

    model = export_model(compiled(net, recipe_for(net)))

    assert "MultiHeadAttention" in [item.op_type for item in model.graph.node]
    assert "com.microsoft" in [item.domain for item in model.opset_import]


def lose_a_node(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d_1"]
    node.name = "renamed"


def read_a_float(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    node.inputs[0] = graph.tensors()["sample"]


def keep_a_float_weight(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    node.inputs[1] = gs.Constant("float_weight", np.zeros((8, 3, 3, 3), np.float32))


def keep_a_float_bias(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    node.inputs[2] = gs.Constant("float_bias", np.zeros(8, np.float32))


def add_a_reader(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    peek = gs.Variable("peek", np.float32)
    graph.nodes.append(gs.Node("Relu", "peek", inputs=[node.outputs[0]], outputs=[peek]))
    graph.outputs.append(peek)


def name_two_alike(graph: gs.Graph) -> None:
    tensors = graph.tensors()
    tensors["gate_1"].name = "silu_1"


def compute_from_time(graph: gs.Graph) -> None:
    (timestep,) = [value for value in graph.inputs if value.name == "timestep"]
    late = gs.Variable("late", np.int64)
    graph.nodes.append(gs.Node("Neg", "node_neg", inputs=[timestep], outputs=[late]))
    graph.outputs.append(late)


def use_an_unknown_operator(graph: gs.Graph) -> None:
    next(item for item in graph.nodes if item.op == "Sigmoid").op = "Sigmund"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_node, "net.conv2d_1: its node node_conv2d_1 is gone"),
        (read_a_float, "net.conv2d: reads sample, which is no integer"),
        (keep_a_float_weight, "net.conv2d: reads float_weight, which is no integer"),
        (keep_a_float_bias, "net.conv2d: reads float_bias, which is no integer"),
        (add_a_reader, "net.conv2d: ort-cpu needs QuantizeLinear on its output"),
        (name_two_alike, "two nodes compute a value named silu_1"),
        (compute_from_time, "node_neg still computes from the timestep"),
        (use_an_unknown_operator, "not valid ONNX: .*Sigmund"),
    ],
)
def test_a_spoilt_graph_is_refused(spoil: Callable[[gs.Graph], None], message: str) -> None:
    net = conv_net()
    recipe = recipe_for(net, activation_bits=6)
    graph = compiled(net, recipe)
    spoil(graph)

    with pytest.raises(PostconditionError, match=message):
        CheckModel(recipe, TARGET, "timestep").ensures(graph)


@pytest.mark.parametrize("make", [conv_net, token_net, vector_net])
def test_checking_changes_nothing(make: Callable[[], Net]) -> None:
    net = make()
    recipe = recipe_for(net)
    graph = compiled(net, recipe)
    before = export_model(graph).SerializeToString(deterministic=True)

    (report,) = run_passes(graph, [CheckModel(recipe, TARGET, "timestep")])

    assert report.changed == ()
    assert export_model(graph).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(export_model(graph))


PLAIN = Target("plain", engine="test", packed_weights=False)


def pack_a_weight(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    dequantize = node.inputs[1].inputs[0]
    cast = gs.Variable("packed", np.int8)
    graph.nodes.append(gs.Node("Cast", "cast", {"to": 3}, inputs=[dequantize.inputs[0]], outputs=[cast]))
    dequantize.inputs[0] = cast


def quantize_a_bias(graph: gs.Graph) -> None:
    (node,) = [item for item in graph.nodes if item.name == "node_conv2d"]
    node.inputs[2] = node.inputs[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pack_a_weight, "net.conv2d: plain needs its weight as plain int8"),
        (quantize_a_bias, "net.conv2d: plain needs its bias as a float constant"),
    ],
)
def test_what_a_target_does_not_fold_is_refused(spoil: Callable[[gs.Graph], None], message: str) -> None:
    net = conv_net()
    recipe = recipe_for(net, 4, 8)
    graph = graph_of(net.model)
    run_passes(graph, passes_for(recipe, PLAIN, sample="sample", timestep="timestep"))
    spoil(graph)

    with pytest.raises(PostconditionError, match=message):
        CheckModel(recipe, PLAIN, "timestep").ensures(graph)
