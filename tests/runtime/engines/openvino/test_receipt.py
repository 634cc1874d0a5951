"""Small QDQ graphs through the real OpenVINO: what runs in integers, and what is lost with which reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets.qdq_graphs import QdqGraph, layer
from onnx import TensorProto, helper

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import BuildError, PrecisionError
from tfmq_export.recipe.names import node_name
from tfmq_export.runtime.engines.openvino.receipt import FUSED, Source, realized_on_openvino, receipt_of
from tfmq_export.runtime.engines.openvino.runner import RuntimeOperation

pytest.importorskip("openvino")

Case = tuple[Path, LayerInfo]
SIDE = 8


def conv(graph: QdqGraph, name: str, x: str, weight: str, bias: str | None = None, **attributes: object) -> str:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return graph.node("Conv", inputs, name, node_name(name), pads=[1] * 4, **attributes)


def image() -> QdqGraph:
    return QdqGraph("batch", 16, SIDE, SIDE)


def save_image(graph: QdqGraph, path: Path, output: str) -> Path:
    return graph.save(path, output, ["batch", 16, SIDE, SIDE])


def conv_without_output_grid(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    return save_image(graph, path, x), layer("conv2d")


def conv_with_a_float_bias_and_a_residual(path: Path) -> Case:
    graph = image()
    weight, bias = graph.weight("conv2d", (16, 16, 3, 3)), graph.real_bias("conv2d", 16)
    x = conv(graph, "conv2d", graph.activation("sample"), weight, bias)
    return save_image(graph, path, graph.node("Add", [x, "sample"], "residual")), layer("conv2d")


def conv_as_onnxruntime_wants_it(path: Path) -> Case:
    graph = image()
    return save_image(graph, path, graph.conv("conv2d", graph.activation("sample"), (16, 16))), layer("conv2d")


def grouped_conv(path: Path) -> Case:
    graph = image()
    weight, bias = graph.weight("conv2d", (16, 4, 3, 3)), graph.real_bias("conv2d", 16)
    x = conv(graph, "conv2d", graph.activation("sample"), weight, bias, group=4)
    return save_image(graph, path, x), layer("conv2d")


def conv_of_packed_weights_and_six_bits(path: Path) -> Case:
    graph = image()
    x = graph.activation("sample", bits=6)
    x = conv(graph, "conv2d", x, graph.weight("conv2d", (16, 16, 3, 3), bits=4), graph.real_bias("conv2d", 16))
    return save_image(graph, path, x), layer("conv2d", weights=4, activations=6)


def conv_of_packed_shifted_weights(path: Path) -> Case:
    graph = image()
    weight = graph.weight("conv2d", (16, 16, 3, 3), bits=4, shifted=True)
    x = conv(graph, "conv2d", graph.activation("sample"), weight, graph.real_bias("conv2d", 16))
    return save_image(graph, path, x), layer("conv2d", weights=4)


def linear_of_rank_2(path: Path) -> Case:
    graph = QdqGraph("batch", 32)
    inputs = [graph.activation("sample"), graph.weight("linear", (32, 32)), graph.real_bias("linear", 32)]
    x = graph.node("Gemm", inputs, "linear", "node_linear", transB=1)
    return graph.save(path, x, ["batch", 32]), layer("linear", "linear")


def linear_in_front_of_silu(path: Path) -> Case:
    """OpenVINO folds the half of ``h + h tanh(h)`` into the layer, which then goes by the half's name."""
    graph = QdqGraph("batch", 32)
    inputs = [graph.activation("sample"), graph.weight("linear", (32, 32)), graph.real_bias("linear", 32)]
    x = graph.node("Gemm", inputs, "linear", "node_linear", transB=1)
    half = graph.node("Mul", [x, graph.constant("one_half", np.array(0.5, np.float32))], "half")
    turned = graph.node("Mul", [half, graph.node("Tanh", [half], "tanh")], "turned")
    return graph.save(path, graph.node("Add", [half, turned], "silu"), ["batch", 32]), layer("linear", "linear")


def linear_of_rank_3(path: Path) -> Case:
    graph = QdqGraph("batch", SIDE, 32)
    x = graph.matmul("linear", graph.activation("sample"), 32, (1, 1, 32))
    return graph.save(path, x, ["batch", SIDE, 32]), layer("linear", "linear")


def linear_of_rank_3_with_a_vector_bias(path: Path) -> Case:
    graph = QdqGraph("batch", SIDE, 32)
    x = graph.matmul("linear", graph.activation("sample", bits=6), 32, (32,), bits=4)
    return graph.save(path, x, ["batch", SIDE, 32]), layer("linear", "linear", weights=4, activations=6)


def linear_of_packed_shifted_weights(path: Path) -> Case:
    graph = QdqGraph("batch", SIDE, 32)
    weight = graph.weight("linear", (32, 32), 1, 4, shifted=True)
    x = graph.node("MatMul", [graph.activation("sample"), weight], "linear", "node_linear")
    return graph.save(path, x, ["batch", SIDE, 32]), layer("linear", "linear", weights=4)


@pytest.mark.parametrize(
    ("layer_origin", "rest_origin"),
    [("node_linear", "node_linear/DequantizationMultiply"), ("node_linear/WithoutBiases", "node_linear")],
    ids=["scale", "bias"],
)
def test_a_layers_scale_or_bias_in_other_code_is_not_the_layer(
    tmp_path: Path, layer_origin: str, rest_origin: str
) -> None:
    # Position embeddings or a residual behind a layer: OpenVINO puts a part of the layer with that sum.
    path, asked = linear_of_rank_2(tmp_path / "m.onnx")
    source = Source.read(path)
    product = RuntimeOperation("FullyConnected", "brgemm_avx512_I8", (layer_origin,))
    rest = RuntimeOperation(FUSED, "jit_avx512_f32", (rest_origin, "node_add"))

    assert receipt_of([product, rest], source, [asked], 1).lost == ()
    assert len(receipt_of([rest], source, [asked], 1).lost) == 1
    assert len(receipt_of([replace(product, kernel="gemm_mlas_f32"), rest], source, [asked], 1).lost) == 1


def test_a_layer_of_a_constant_is_computed_once_and_not_lost(tmp_path: Path) -> None:
    path, asked = linear_of_rank_2(tmp_path / "m.onnx")
    folded = RuntimeOperation("Const", "unknown_f32", ("node_linear",))

    (row,) = receipt_of([folded], Source.read(path), [asked], 1).rows

    assert (row.realized, row.reason) == (("Const unknown_f32",), "")


def test_a_layer_that_lost_its_name_is_known_by_its_weight(tmp_path: Path) -> None:
    path, asked = linear_of_rank_2(tmp_path / "m.onnx")
    source = Source.read(path)
    _, weight = source.operands("node_linear")
    assert weight is not None
    renamed = RuntimeOperation("FullyConnected", "brgemm_avx512_I8", ("Multiply_1",), sources=(weight.inputs[0],))

    assert receipt_of([renamed], source, [asked], 1).lost == ()
    assert len(receipt_of([replace(renamed, kernel="gemm_mlas_f32")], source, [asked], 1).lost) == 1
    assert len(receipt_of([replace(renamed, sources=("other",))], source, [asked], 1).lost) == 1


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (conv_without_output_grid, "Convolution"),
        (conv_with_a_float_bias_and_a_residual, "Convolution"),
        (conv_as_onnxruntime_wants_it, "Convolution"),
        (grouped_conv, "Convolution"),
        (conv_of_packed_weights_and_six_bits, "Convolution"),
        (conv_of_packed_shifted_weights, "Convolution"),
        (linear_of_rank_2, "FullyConnected"),
        (linear_in_front_of_silu, "FullyConnected"),
        (linear_of_rank_3, "FullyConnected"),
        (linear_of_rank_3_with_a_vector_bias, "FullyConnected"),
        (linear_of_packed_shifted_weights, "FullyConnected"),
    ],
)
def test_every_form_the_compiler_writes_runs_in_integers(
    tmp_path: Path, build: Callable[[Path], Case], kind: str, precision: str
) -> None:
    path, asked = build(tmp_path / "m.onnx")

    receipt = realized_on_openvino(path, [asked], precision=precision, macs=400)

    receipt.raise_if_lost()
    ((kernel,),) = [row.realized for row in receipt.rows]
    assert kernel.startswith(kind)
    assert kernel.lower().endswith("i8")
    assert receipt.counts(asked.kind) == (1, 1)
    assert receipt.integer_share == 0.25


def lost_without_input_grid(path: Path) -> Case:
    graph = image()
    return save_image(graph, path, conv(graph, "conv2d", "sample", graph.weight("conv2d", (16, 16, 3, 3)))), layer(
        "conv2d"
    )


def lost_behind_a_relu(path: Path) -> Case:
    graph = image()
    x = graph.node("Relu", [graph.activation("sample")], "relu")
    return save_image(graph, path, conv(graph, "conv2d", x, graph.weight("conv2d", (16, 16, 3, 3)))), layer("conv2d")


def lost_by_a_float_weight(path: Path) -> Case:
    graph = image()
    weight = graph.constant("kernel", graph.rng.standard_normal((16, 16, 3, 3)).astype(np.float32))
    return save_image(graph, path, conv(graph, "conv2d", graph.activation("sample"), weight)), layer("conv2d")


def replace_constant(graph: QdqGraph, name: str, value: np.ndarray) -> None:
    graph.constants = [item for item in graph.constants if item.name != name]
    graph.constant(name, value)


def lost_by_an_offset_weight(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    replace_constant(graph, "conv2d.weight_zero", np.full(16, 3, np.int8))
    return save_image(graph, path, x), layer("conv2d")


def lost_by_an_unsigned_weight(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    codes = np.random.default_rng(0).integers(0, 256, (16, 16, 3, 3)).astype(np.uint8)
    replace_constant(graph, "conv2d.weight_codes", codes)
    replace_constant(graph, "conv2d.weight_zero", np.full(16, 128, np.uint8))
    return save_image(graph, path, x), layer("conv2d")


def lost_by_a_scale_per_channel(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    replace_constant(graph, "sample.scale", np.linspace(0.01, 0.02, 16, dtype=np.float32))
    replace_constant(graph, "sample.zero", np.full(16, 20, np.uint8))
    return save_image(graph, path, x), layer("conv2d")


def lost_by_sixteen_bits(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    replace_constant(graph, "sample.zero", np.uint16(20))
    return save_image(graph, path, x), layer("conv2d")


def lost_by_reading_packed_codes(path: Path) -> Case:
    """OpenVINO reports this product's precision as i4; it multiplies in floating point."""
    graph = QdqGraph("batch", SIDE, 32)
    x = graph.matmul("linear", graph.activation("sample"), 32, (1, 1, 32), bits=4)
    graph.nodes = [node for node in graph.nodes if node.op_type != "Cast"]
    (dequantize,) = [node for node in graph.nodes if node.name == "linear.weight_dq"]
    dequantize.input[0] = "linear.weight_codes"
    graph.constants = [item for item in graph.constants if item.name != "linear.weight_zero"]
    graph.constants.append(helper.make_tensor("linear.weight_zero", TensorProto.INT4, [32], [0] * 32))
    return graph.save(path, x, ["batch", SIDE, 32]), layer("linear", "linear", weights=4)


def lost_by_a_shared_zero_point(path: Path) -> Case:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    rows = graph.node("Reshape", [x, graph.constant("rows", np.asarray([-1, 16]))], "flat")
    inputs = [graph.activation(rows), graph.weight("linear", (16, 16))]
    graph.node("Gemm", inputs, "linear", "node_linear", transB=1)
    (dequantize,) = [node for node in graph.nodes if node.name == "linear.weight_dq"]
    dequantize.input[2] = "conv2d.weight_zero"
    return graph.save(path, "linear", ["rows", 16]), layer("linear", "linear")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lost_without_input_grid, "its input does not come straight from DequantizeLinear"),
        (lost_behind_a_relu, "its input does not come straight from DequantizeLinear"),
        (lost_by_a_float_weight, "its weight or second factor is not quantized"),
        (lost_by_an_offset_weight, "its weight has a zero point that is not 0"),
        (lost_by_an_unsigned_weight, "its weight is stored as uint8"),
        (lost_by_a_scale_per_channel, "its input has a scale for each channel"),
        (lost_by_sixteen_bits, "its input is quantized to uint16"),
        (lost_by_reading_packed_codes, "its weight is stored as int4; .* behind a Cast to int8"),
        (lost_by_a_shared_zero_point, "share its zero point"),
    ],
)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_each_silent_loss_is_caught_with_its_reason(
    tmp_path: Path, build: Callable[[Path], Case], reason: str, precision: str
) -> None:
    path, asked = build(tmp_path / "m.onnx")

    receipt = realized_on_openvino(path, [asked], precision=precision)

    assert [row.layer for row in receipt.lost] == [asked]
    assert receipt.integer_share == 0.0
    with pytest.raises(PrecisionError, match=f"unet.{asked.name}: runs as .* in float: .*{reason}"):
        receipt.raise_if_lost()


def test_one_lost_layer_among_many_is_named(tmp_path: Path) -> None:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3)))
    x = conv(graph, "conv2d_1", graph.node("Sigmoid", [x], "gate"), graph.weight("conv2d_1", (16, 16, 3, 3)))
    x = conv(graph, "conv2d_10", graph.activation(x), graph.weight("conv2d_10", (16, 16, 3, 3)))
    path = save_image(graph, tmp_path / "m.onnx", x)

    receipt = realized_on_openvino(path, [layer(name) for name in ("conv2d", "conv2d_1", "conv2d_10")])

    assert [row.layer.name for row in receipt.lost] == ["conv2d_1"]
    assert receipt.counts("conv") == (2, 3)


def test_a_layer_in_parts_is_lost_with_any_of_them(tmp_path: Path) -> None:
    graph = image()
    weights = [graph.weight(f"conv2d.part_{index}", (16, 16, 3, 3)) for index in range(2)]
    sources = [graph.activation("sample"), "sample"]
    parts = [
        conv(graph, f"conv2d.part_{index}", x, weight)
        for index, (x, weight) in enumerate(zip(sources, weights, strict=True))
    ]
    path = save_image(graph, tmp_path / "m.onnx", graph.node("Add", parts, "conv2d"))

    (row,) = realized_on_openvino(path, [layer("conv2d")]).lost

    assert len(row.realized) == 2
    assert not row.integer


def test_a_renamed_node_is_found_by_its_weight(tmp_path: Path) -> None:
    graph = image()
    x = conv(graph, "conv2d", graph.activation("sample"), graph.weight("conv2d", (16, 16, 3, 3), bits=4))
    for node in graph.nodes:
        node.name = f"anonymous_{node.name.replace('conv2d', 'c')}"
    path = save_image(graph, tmp_path / "m.onnx", x)

    receipt = realized_on_openvino(path, [layer("conv2d", weights=4)])

    receipt.raise_if_lost()
    assert receipt.rows[0].emulated == "4-bit weights on 8-bit kernels"


def test_a_layer_nobody_has_is_not_found(tmp_path: Path) -> None:
    path, _ = conv_without_output_grid(tmp_path / "m.onnx")

    (row,) = realized_on_openvino(path, [layer("conv2d_1")]).lost

    assert row.realized == ()
    assert "no operation node_conv2d_1 in OpenVINO's runtime model" in row.reason


def test_layers_nobody_asked_for_are_strays_when_they_dequantize(tmp_path: Path) -> None:
    path, _ = lost_by_an_offset_weight(tmp_path / "m.onnx")

    receipt = realized_on_openvino(path, [])

    assert [name for name, _ in receipt.strays] == ["node_conv2d"]
    assert "in float" not in receipt.strays[0][1]
    with pytest.raises(PrecisionError, match=r"node_conv2d: .* on dequantized operands"):
        receipt.raise_if_lost()


def test_float_layers_are_no_strays_and_no_loss(tmp_path: Path) -> None:
    graph = image()
    kernels = [graph.constant(f"k{index}", graph.rng.standard_normal((16, 16, 3, 3)).astype("f4")) for index in (0, 1)]
    x = conv(graph, "conv2d_1", conv(graph, "conv2d", "sample", kernels[0]), kernels[1])
    path = save_image(graph, tmp_path / "m.onnx", x)

    receipt = realized_on_openvino(path, [layer("conv2d", weights=0, activations=0)])

    receipt.raise_if_lost()
    assert not receipt.rows[0].integer


def test_a_layer_asked_to_stay_float_must_not_run_in_integers(tmp_path: Path) -> None:
    path, _ = conv_without_output_grid(tmp_path / "m.onnx")

    receipt = realized_on_openvino(path, [layer("conv2d", weights=0, activations=0)])

    with pytest.raises(PrecisionError, match="asked to stay float, runs as Convolution"):
        receipt.raise_if_lost()


def test_weights_outside_the_file_are_not_needed(tmp_path: Path) -> None:
    path, asked = lost_by_an_offset_weight(tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)

    (row,) = realized_on_openvino(path, [asked]).lost

    assert "unknown" in row.reason  # the zero points lie outside too


def test_a_receipt_is_json(tmp_path: Path) -> None:
    path, asked = lost_by_a_float_weight(tmp_path / "m.onnx")

    data = json.loads(json.dumps(realized_on_openvino(path, [asked]).to_json()))

    assert data["convs"] == [0, 1]
    assert data["layers"][0]["lost"].startswith("runs as Convolution")


def test_a_graph_openvino_refuses_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a graph")

    with pytest.raises(BuildError, match="OpenVINO refuses this graph"):
        realized_on_openvino(path, [])


@pytest.mark.parametrize("width", [16, 256])
def test_narrow_linear_layers_in_a_row_are_not_fused_away(width: int, tmp_path: Path) -> None:
    graph = QdqGraph("batch", width)
    x = "sample"
    for name in ("linear", "linear_1"):
        weight = graph.weight(name, (width, width))
        x = graph.node("Gemm", [graph.activation(x, stem=name), weight], name, node_name(name), transB=1)
        x = graph.node("Relu", [x], f"{name}.relu")
    path = graph.save(tmp_path / "model.onnx", x, ["batch", width])

    receipt = realized_on_openvino(path, [layer("linear", "linear"), layer("linear_1", "linear")])

    assert not receipt.lost
    assert all("FullyConnected" in row.realized[0] for row in receipt.rows)
