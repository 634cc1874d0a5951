"""Small QDQ graphs through the real onnxruntime-qnn: what is on the NPU in integers, and what is lost, and why."""

import importlib.util
from pathlib import Path

import pytest
from nets.qdq_graphs import QdqGraph, layer

from tfmq_export.recipe.names import node_name
from tfmq_export.runtime.engines.qnn.receipt import Account, NpuOperation, realized_on_qnn, receipt_of

needs_qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")
SIDE = 8


def conv_graph(path: Path, *, output_grid: bool) -> Path:
    """A convolution of 8-bit integers, with or without a grid on its result."""
    graph = QdqGraph("batch", 16, SIDE, SIDE)
    x, weight = graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3))
    y = graph.node("Conv", [x, weight], "conv2d", node_name("conv2d"), pads=[1] * 4)
    return graph.save(path, graph.activation(y) if output_grid else y, ["batch", 16, SIDE, SIDE])


@needs_qnn
def test_a_convolution_between_two_grids_runs_in_integers(tmp_path: Path) -> None:
    receipt = realized_on_qnn(conv_graph(tmp_path / "model.onnx", output_grid=True), [layer("conv2d")])

    assert not receipt.lost
    assert not receipt.strays
    assert receipt.rows[0].realized == ("Conv2d uint8 x int8 -> uint8",)


@needs_qnn
def test_a_convolution_without_an_output_grid_runs_in_floating_point(tmp_path: Path) -> None:
    receipt = realized_on_qnn(conv_graph(tmp_path / "model.onnx", output_grid=False), [layer("conv2d")])

    (row,) = receipt.lost
    assert row.reason == "runs as Conv2d float32 x float32 -> float32, in floating point"


@needs_qnn
def test_an_operation_between_two_layers_that_is_no_integer_is_a_stray(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 16, SIDE, SIDE)
    x, weight = graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3))
    y = graph.activation(graph.node("Conv", [x, weight], "conv2d", node_name("conv2d"), pads=[1] * 4))
    graph.save(tmp_path / "model.onnx", graph.node("Sigmoid", [y], "gate", "gate"), ["batch", 16, SIDE, SIDE])

    receipt = realized_on_qnn(tmp_path / "model.onnx", [layer("conv2d")])

    assert not receipt.lost
    assert "runs as Sigmoid float32 -> float32, in floating point" in [reason for _, reason in receipt.strays]


@needs_qnn
def test_what_the_provider_leaves_to_the_cpu_is_named_with_its_reason(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 16, SIDE, SIDE)
    x, weight = graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3))
    y = graph.activation(graph.node("Conv", [x, weight], "conv2d", node_name("conv2d"), pads=[1] * 4))
    z = graph.node("Einsum", [y], "turned", "turned", equation="nchw->nhwc")
    graph.save(tmp_path / "model.onnx", z, ["batch", SIDE, SIDE, 16])

    receipt = realized_on_qnn(tmp_path / "model.onnx", [layer("conv2d")])

    assert ("turned", "Einsum runs on the CPU: Einsum requires at least 2 inputs.") in receipt.strays


def operation(
    name: str, *nodes: str, reads: tuple[str, ...] = ("uint16", "int8"), kind: str = "Conv2d"
) -> NpuOperation:
    return NpuOperation(kind, name, reads, ("uint16",), nodes)


def test_a_layer_is_found_by_the_nodes_that_its_operation_was_made_of() -> None:
    nodes = ("x_dq", node_name("conv2d"))
    account = Account((NpuOperation("Conv2d", "fused_7", ("uint16", "int8"), ("uint16",), nodes),), ())

    receipt = receipt_of(account, [layer("conv2d")], 1)

    assert receipt.rows[0].realized == ("Conv2d uint16 x int8 -> uint16",)
    assert not receipt.lost


def test_a_layer_that_is_nowhere_is_lost() -> None:
    receipt = receipt_of(Account((), ()), [layer("conv2d")], 1)

    assert receipt.lost[0].reason.startswith("no operation node_conv2d in the compiled graph")


def test_a_layer_on_the_cpu_is_lost_with_the_providers_words() -> None:
    receipt = receipt_of(Account((), ((node_name("conv2d"), "Conv", "Too many groups."),)), [layer("conv2d")], 1)

    assert receipt.lost[0].reason == "runs on the CPU: Too many groups."
    assert receipt.strays == ((node_name("conv2d"), "Conv runs on the CPU: Too many groups."),)


def test_quantizing_the_sample_is_no_stray() -> None:
    ends = (
        NpuOperation("Quantize", "in", ("float32",), ("uint16",), ()),
        NpuOperation("Dequantize", "out", ("uint16",), ("float32",), ()),
    )

    assert not receipt_of(Account(ends, ()), [], 1).strays
