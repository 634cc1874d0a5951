"""Which layer an operation of an engine's graph computes."""

import pytest

from tfmq_export.runtime.measure.operations import Operation, layer_of, producers_of

LAYERS = ("conv2d", "conv2d_1", "linear")


def operation(name: str, *inputs: str) -> Operation:
    return Operation("Conv", name, inputs, (f"{name}.result",))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("node_conv2d", "conv2d"),
        ("node_conv2d_1", "conv2d_1"),
        ("node_conv2d_1_token_7", "conv2d_1"),
        ("node_linear/MatMulAddFusion", "linear"),
        ("node_conv2d.part_1", "conv2d"),
        ("node_conv2d_2", None),
        ("fused", None),
    ],
)
def test_a_layer_is_found_by_its_node(name: str, layer: str | None) -> None:
    assert layer_of(operation(name), LAYERS, {}) == layer


@pytest.mark.parametrize(
    ("weight", "layer"),
    [("conv2d_1.weight_codes", "conv2d_1"), ("linear.part_0.weight_codes", "linear"), ("conv2d_2.weight", None)],
)
def test_a_renamed_node_is_found_by_its_weight(weight: str, layer: str | None) -> None:
    dequantize = Operation("DequantizeLinear", "dequantize", (weight, "scale"), ("real",))
    turn = Operation("Transpose", "turn", ("real",), ("turned",))

    assert layer_of(operation("fused", "x", "turned"), LAYERS, producers_of([dequantize, turn])) == layer


def test_a_weight_behind_arithmetic_names_nobody() -> None:
    scaled = Operation("Mul", "scaled", ("linear.weight", "factor"), ("product",))

    assert layer_of(operation("fused", "x", "product"), LAYERS, producers_of([scaled])) is None
