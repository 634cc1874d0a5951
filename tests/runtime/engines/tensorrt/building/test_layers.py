"""Reading the layer list, from lines TensorRT-RTX 1.7 wrote."""

import pytest

from tfmq_export.runtime.engines.tensorrt.building.layers import parse_layers

TENSOR = (
    "{{ Name: t, Dimensions: [-1,16,8,8], Strides: [1,1,1,1], StrideOrder: [3,0,2,1], "
    "Datatype: {}, Format: (NHWC) Channel major format }}"
)


def line(kind: str, inputs: str, constants: str, outputs: str, nodes: str = "node_conv2d") -> str:
    def tensors(types: str) -> str:
        return ", ".join(TENSOR.format(each) for each in types.split())

    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return (
        f"Name: node_conv2d_myl0_2, LayerType: {kind}, Inputs: [ {tensors(inputs)}], "
        f"Constants: [ {tensors(constants)}], "
        f"Outputs: [ {tensors(outputs)}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


def test_types_and_nodes_are_read() -> None:
    text = line("correlation", "Int8", "Int8 Float Float", "Float", "node_conv2d x.dequantize conv2d.weight_dq")

    (layer,) = parse_layers(
        ["Engine generation completed", f"Layers:\n{text}\n\nI/O Tensors:\n Name: x, IOMode: Input"]
    )

    assert layer.name == "node_conv2d_myl0_2"
    assert layer.kind == "correlation"
    assert (layer.inputs, layer.constants, layer.outputs) == (("Int8",), ("Int8", "Float", "Float"), ("Float",))
    assert layer.nodes == ("node_conv2d", "x.dequantize", "conv2d.weight_dq")


def test_layers_without_tensors_are_read() -> None:
    empty = "Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "

    (layer,) = parse_layers([f"Name: s, LayerType: shape_call, {empty}"])

    assert (layer.inputs, layer.nodes, layer.computes, layer.type) == ((), (), False, "")


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "outputs", "computes", "computed_in"),
    [
        ("correlation", "Int8", "Int8 Float Float", "Float", True, "Int8"),
        ("gemm", "Int8", "Int8 Float Float", "Half", True, "Int8"),
        ("gemm", "Int8 Int8", "Float", "Half", True, "Int8"),
        ("correlation", "Half Half", "Float Float Half", "Half", True, "Half"),
        ("correlation", "Float Float", "Float", "Float", True, "Float"),
        ("runtime_fusion", "Half", "Half Int8", "Half", True, "Half"),
        ("runtime_fusion", "Int8", "Int8 Half", "Half", True, "Half"),
        ("correlation", "Half", "Half Int8", "Half", True, "Half"),
        ("correlation", "Int8", "Half Float Float", "Half", True, "Half"),
        ("kgen", "Half", "Half", "Int8", False, "Half"),
    ],
)
def test_int8_means_both_operands_and_no_dequantizing_kernel(
    kind: str, inputs: str, constants: str, outputs: str, computes: bool, computed_in: str
) -> None:
    (layer,) = parse_layers([line(kind, inputs, constants, outputs)])

    assert (layer.computes, layer.type) == (computes, computed_in)


def test_a_log_without_the_list_has_no_layers() -> None:
    assert parse_layers(["Engine generation completed in 0.2 seconds.", ""]) == ()
