"""Small QDQ graphs, written the way the compiler writes them, through the real ONNX Runtime."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nets.qdq_graphs import X_SCALE, QdqGraph, layer

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import BuildError, PrecisionError
from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.runtime.measure.receipt import Receipt

Build = Callable[[Path], tuple[Path, LayerInfo]]


def realized(receipt: Receipt) -> dict[str, tuple[str, ...]]:
    return {row.layer.name: row.realized for row in receipt.rows}


def test_quantized_convolutions_run_in_integers(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16))
    x = graph.node("Mul", [x, graph.node("Sigmoid", [x], "gate")], "silu")
    x = graph.conv("conv2d_1", graph.activation(x, bits=6), (16, 16), bits=4)
    x = graph.conv("conv2d_10", x, (16, 16))
    path = graph.save(tmp_path / "m.onnx", x, ["batch", 16, 16, 16])
    asked = [layer("conv2d"), layer("conv2d_1", weights=4, activations=6), layer("conv2d_10")]

    receipt = realized_on_ort(path, asked, work_dir=tmp_path, macs=400)

    receipt.raise_if_lost()
    assert realized(receipt) == dict.fromkeys(["conv2d", "conv2d_1", "conv2d_10"], ("QLinearConv",))
    assert receipt.counts("conv") == (3, 3)
    assert receipt.integer_share == 0.75
    assert [row.asked for row in receipt.rows] == ["W8A8", "W4A6", "W8A8"]
    assert [row.emulated for row in receipt.rows] == [
        "",
        "4-bit weights and 6-bit activations on 8-bit kernels",
        "",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_float_layers_behind_quantized_ones_are_no_loss(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16))
    kernel = graph.constant("out.weight", graph.rng.standard_normal((4, 16, 3, 3)).astype(np.float32))
    x = graph.node("Conv", [x, kernel], "conv2d_1", "node_conv2d_1", pads=[1] * 4)
    path = graph.save(tmp_path / "m.onnx", x, ["batch", 4, 16, 16])

    receipt = realized_on_ort(path, [layer("conv2d"), layer("conv2d_1", weights=0, activations=0)])

    receipt.raise_if_lost()
    assert receipt.rows[1].asked == "float"
    assert not receipt.rows[1].integer
    assert receipt.integer_share == 0.5


def test_linear_layers_run_in_integers_in_either_spelling(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 8, 32)
    tokens = graph.activation(graph.matmul("linear", graph.activation("sample"), 32, (1, 1, 32), bits=4))
    rows = graph.node("Reshape", [tokens, graph.constant("rows", np.asarray([-1, 32]))], "flat")
    inputs = [rows, graph.weight("linear_1", (32, 32)), graph.bias("linear_1", 32)]
    graph.node("Gemm", inputs, "linear_1", "node_linear_1", transB=1)
    path = graph.save(tmp_path / "m.onnx", graph.activation("linear_1"), ["rows", 32])

    receipt = realized_on_ort(path, [layer("linear", "linear", weights=4), layer("linear_1", "linear")])

    receipt.raise_if_lost()
    assert realized(receipt) == {"linear": ("MatMulIntegerToFloat",), "linear_1": ("QGemm",)}
    assert receipt.counts("linear") == (2, 2)


def lost_conv_without_output_grid(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16), output=False)
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d")


def lost_conv_with_a_residual(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 16, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (16, 16), output=False)
    x = graph.activation(graph.node("Add", [x, "sample"], "residual"))
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d")


def lost_conv_with_two_readers(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16))
    x = graph.node("Add", [x, "conv2d"], "sum")
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d")


def lost_conv_with_a_foreign_bias_scale(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample", scale=2 * X_SCALE), (4, 16))
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d")


def lost_conv_without_input_grid(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", "sample", (4, 16))
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d")


def lost_matmul_with_a_vector_bias(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 32)
    x = graph.matmul("linear", graph.activation("sample"), 32, (32,))
    return graph.save(path, x, ["batch", 32]), layer("linear", "linear")


def lost_by_a_foreign_name(path: Path) -> tuple[Path, LayerInfo]:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16))
    return graph.save(path, x, ["batch", 16, 16, 16]), layer("conv2d_1")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lost_conv_without_output_grid, "no QuantizeLinear follows it"),
        (lost_conv_with_a_residual, "runs as FusedConv in float: no QuantizeLinear follows it"),
        (lost_conv_with_two_readers, "its output is used in float beside the QuantizeLinear"),
        (lost_conv_with_a_foreign_bias_scale, "check that the bias scale is input scale x weight scale"),
        (lost_conv_without_input_grid, "its input is not quantized"),
        (lost_matmul_with_a_vector_bias, r"give the bias the shape \[1, 1, N\]"),
        (lost_by_a_foreign_name, "no operation node_conv2d_1 in the optimized graph"),
    ],
)
def test_each_silent_loss_is_caught_with_its_reason(tmp_path: Path, build: Build, reason: str) -> None:
    path, asked = build(tmp_path / "m.onnx")

    receipt = realized_on_ort(path, [asked])

    assert [row.layer for row in receipt.lost] == [asked]
    assert receipt.integer_share == 0.0
    assert receipt.counts(asked.kind) == (0, 1)
    with pytest.raises(PrecisionError, match=f"1 of 1 layers are not what was asked: unet.{asked.name}: .*{reason}"):
        receipt.raise_if_lost()


def test_a_layer_in_parts_is_lost_with_any_of_them(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.activation("sample")
    parts = [graph.conv(f"conv2d.part_{index}", x, (4, 16), output=index == 0) for index in range(2)]
    path = graph.save(tmp_path / "m.onnx", graph.node("Add", parts, "conv2d"), ["batch", 16, 16, 16])

    (row,) = realized_on_ort(path, [layer("conv2d")]).lost

    assert row.realized == ("FusedConv", "QLinearConv")
    assert not row.integer


def test_a_node_renamed_by_the_runtime_is_found_by_its_weight(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16), bits=4)
    for node in graph.nodes:
        node.name = f"anonymous_{node.name.replace('conv2d', 'c')}"
    path = graph.save(tmp_path / "m.onnx", x, ["batch", 16, 16, 16])

    receipt = realized_on_ort(path, [layer("conv2d")])

    receipt.raise_if_lost()
    assert realized(receipt) == {"conv2d": ("QLinearConv",)}


def test_layers_nobody_asked_for_are_strays_when_they_dequantize(tmp_path: Path) -> None:
    path, _ = lost_conv_without_output_grid(tmp_path / "m.onnx")

    receipt = realized_on_ort(path, [])

    assert receipt.strays == (("node_conv2d", "runs as Conv on dequantized operands"),)
    with pytest.raises(PrecisionError, match="node_conv2d"):
        receipt.raise_if_lost()


def test_a_layer_asked_to_stay_float_must_not_run_in_integers(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 16, 16)
    x = graph.conv("conv2d", graph.activation("sample"), (4, 16))
    path = graph.save(tmp_path / "m.onnx", x, ["batch", 16, 16, 16])

    receipt = realized_on_ort(path, [layer("conv2d", weights=0, activations=0)])

    with pytest.raises(PrecisionError, match="asked to stay float, runs as QLinearConv"):
        receipt.raise_if_lost()


def test_a_float_product_of_two_quantized_results_may_multiply_their_codes(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 8, 8)
    x = graph.activation("sample")
    tokens = graph.constant("tokens", np.array([0, 16, 64]))
    q, k = (graph.node("Reshape", [graph.conv(name, x, (4, 16)), tokens], f"{name}.tokens") for name in ("q", "k"))
    turned = graph.node("Transpose", [q], "turned", perm=[0, 2, 1])
    scores = graph.node("MatMul", [turned, k], "scores", "node_scores")
    path = graph.save(tmp_path / "m.onnx", scores, ["batch", 64, 64])

    receipt = realized_on_ort(path, [layer("q"), layer("k"), layer("scores", weights=0, activations=0)])

    receipt.raise_if_lost()
    assert realized(receipt)["scores"] == ("MatMulIntegerToFloat",)
    assert not receipt.rows[2].integer  # nobody asked for it, so it does not count
    assert receipt.counts("conv") == (2, 2)


def test_a_receipt_is_json(tmp_path: Path) -> None:
    path, asked = lost_conv_without_output_grid(tmp_path / "m.onnx")

    data = json.loads(json.dumps(realized_on_ort(path, [asked]).to_json()))

    assert data["convs"] == [0, 1]
    assert data["layers"][0]["realized"] == ["Conv"]
    assert data["layers"][0]["lost"].startswith("runs as Conv in float")


def test_a_graph_the_runtime_refuses_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a graph")

    with pytest.raises(BuildError, match="refuses this graph"):
        realized_on_ort(path, [])
