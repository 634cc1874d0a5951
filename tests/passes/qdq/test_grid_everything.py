from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import build, graph_of, infer, normal
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.qdq.grid_everything import FINER, GridEverything, WideGrid

SHAPE = ("n", 4, 3, 3)
X = normal(0, 2, 4, 3, 3)


def intervals_of(model: onnx.ModelProto, x: NDArray) -> dict[str, tuple[float, float]]:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    stored = {item.name for item in model.graph.initializer}
    kept = [node for node in model.graph.node if node.op_type != "QuantizeLinear" and node.input[0] not in stored]
    names = [name for node in kept for name in node.output]
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    values = dict(zip(names, infer(shown, {"x": x}, integer=False), strict=True)) | {"x": x}
    return {name: (float(value.min()), float(value.max())) for name, value in values.items()}


def gridded(model: onnx.ModelProto, x: NDArray = X) -> gs.Graph:
    graph = graph_of(model)
    run_passes(graph, [GridEverything(intervals_of(model, x))])
    return graph


def net(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, NDArray] | None = None, shape: tuple[object, ...] = SHAPE
) -> onnx.ModelProto:
    return build(nodes, {"x": SHAPE}, {"y": shape}, constants)


def node(op: str, inputs: str, output: str, **attrs: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], f"node_{output}", **attrs)


RESIDUAL = net(
    [node("Mul", "x gain", "a"), node("Tanh", "a", "t"), node("Mul", "a t", "p"), node("Add", "p x", "y")],
    {"gain": normal(1, 1, 4, 1, 1)},
)


def quantizers_of(graph: gs.Graph) -> dict[str, tuple[float, int]]:
    """Scale and zero point by the value that is quantized."""
    found = [each for each in graph.nodes if each.op == "QuantizeLinear"]
    return {each.inputs[0].name: (float(each.inputs[1].values), int(each.inputs[2].values)) for each in found}


def test_every_operation_reads_and_writes_sixteen_bits() -> None:
    graph = gridded(RESIDUAL)

    for each in graph.nodes:
        if each.op in ("QuantizeLinear", "DequantizeLinear"):
            assert each.inputs[2].values.dtype == np.uint16
        else:
            assert all(value.inputs[0].op == "DequantizeLinear" for value in each.inputs), each.name
            assert [x.op for value in each.outputs for x in value.outputs] == ["QuantizeLinear"], each.name


def test_numbers_change_by_roundings_of_sixteen_bits() -> None:
    (expected,), (actual,) = infer(RESIDUAL, {"x": X}), infer(gridded(RESIDUAL), {"x": X}, integer=False)

    # Six roundings of half a step, each of at most 1.5 times the widest value over 2^15.
    assert 0 < np.abs(actual - expected).max() < 6 * 1.5 * np.abs(X).max() ** 2 / 2**15


def test_what_moves_numbers_keeps_their_grid() -> None:
    shape = {"rows": np.array([0, -1], np.int64)}
    graph = gridded(net([node("Tanh", "x", "t"), node("Reshape", "t rows", "y")], shape, ("n", 36)))

    grids = quantizers_of(graph)

    assert grids["t.real"] == grids["y.real"]


@pytest.mark.parametrize(("op", "grid"), [("Sigmoid", (2.0**-16, 0)), ("Tanh", (2.0**-15, 2**15))])
def test_a_bounded_function_has_the_grid_of_its_range(op: str, grid: tuple[float, int]) -> None:
    graph = gridded(net([node(op, "x", "y")]))

    assert quantizers_of(graph)["y.real"] == grid


def test_an_affine_of_each_channel_is_exact_in_eight_bits() -> None:
    gain, start = normal(1, 4, 1, 1, 1), normal(2, 4)
    gain[2] = 0
    model = net([node("Conv", "x gain start", "y", group=4, kernel_shape=[1, 1])], {"gain": gain, "start": start})
    graph = gridded(model)

    (conv,) = [each for each in graph.nodes if each.op == "Conv"]
    codes, scale, _ = (value.values for value in conv.inputs[1].inputs[0].inputs)
    np.testing.assert_allclose(codes.reshape(-1) * scale, gain.reshape(-1), rtol=1e-6)
    read, sums = conv.inputs[0].inputs[0].inputs[1].values, conv.inputs[2].inputs[0].inputs[1].values
    np.testing.assert_array_equal(sums, (read * scale).astype(np.float32))


def test_an_affine_in_front_of_a_layer_of_eight_bits_writes_sixteen() -> None:
    constants = {"gain": normal(1, 4, 1, 1, 1), "start": normal(2, 4), "s": np.float32(0.05), "z": np.uint8(100)}
    nodes = [
        node("Conv", "x gain start", "affine", group=4, kernel_shape=[1, 1]),
        node("QuantizeLinear", "affine s z", "q"),
        node("DequantizeLinear", "q s z", "y"),
    ]
    graph = gridded(net(nodes, constants))

    (conv,) = [each for each in graph.nodes if each.op == "Conv"]
    (first,) = conv.outputs[0].outputs
    assert (first.op, first.inputs[2].values.dtype) == ("QuantizeLinear", np.uint16)
    (second,) = first.outputs[0].outputs[0].outputs[0].outputs
    assert (second.op, second.inputs[2].values.dtype) == ("QuantizeLinear", np.uint8)


@pytest.mark.parametrize("turned", [False, True])
def test_a_linear_layer_off_the_recipe_has_weights_of_eight_bits_for_each_channel(turned: bool) -> None:
    weight, bias = normal(1, 5, 36) * np.float32([[1], [10], [0.1], [0], [1]]), normal(2, 5)
    constants = {"weight": weight if turned else weight.T.copy(), "bias": bias}
    nodes = [node("Flatten", "x", "rows"), node("Gemm", "rows weight bias", "y", transB=int(turned))]
    model = net(nodes, constants, ("n", 5))

    graph = gridded(model)

    (gemm,) = [each for each in graph.nodes if each.op == "Gemm"]
    codes, scale, zero_point = (value.values for value in gemm.inputs[1].inputs[0].inputs)
    stored, sums, _ = (value.values for value in gemm.inputs[2].inputs[0].inputs)
    assert (codes.dtype, zero_point.dtype, stored.dtype) == (np.int8, np.int8, np.int32)
    kept = codes * scale[:, None] if turned else codes * scale
    np.testing.assert_allclose(kept, constants["weight"], atol=0.51 * scale.max())
    read = gemm.inputs[0].inputs[0].inputs[1].values
    np.testing.assert_array_equal(sums, (read * scale).astype(np.float32))
    (wanted,), (found,) = infer(model, {"x": X}), infer(graph, {"x": X})
    half_steps = 0.51 * scale * np.abs(X).reshape(len(X), -1).sum(1, keepdims=True)  # of each weight; then 16 bits
    assert (np.abs(found - wanted) <= half_steps + 1e-3 * np.abs(wanted).max()).all()


def test_results_of_eight_bits_are_read_without_a_rounding() -> None:
    narrow = {"s": np.float32(0.05), "z": np.uint8(100)}
    nodes = [
        node("Tanh", "x", "t"),
        node("QuantizeLinear", "t s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("Tanh", "d", "y"),
    ]
    graph = gridded(net(nodes, narrow))

    scale, zero_point = quantizers_of(graph)["d"]

    assert zero_point == 100 * FINER
    assert scale == np.float32(np.float32(0.05) / np.float32(FINER))


def test_zero_and_both_ends_are_numbers_of_a_grid() -> None:
    for low, high in ((-3.0, 1.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0)):
        grid = WideGrid.over(low, high)

        ends = np.array([min(low, 0), 0, max(high, 0)])
        back = (grid.codes(ends).astype(np.float64) - grid.zero_point) * grid.scale
        np.testing.assert_allclose(back, ends, atol=0.51 * float(grid.scale) if high > low else 0)


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        ([node("Conv", "x w", "y", kernel_shape=[3, 3])], {"w": normal(1, 4, 4, 3, 3)}, "quantize it"),
        (
            [node("Flatten", "x", "rows"), node("Gemm", "rows w", "y", alpha=0.5)],
            {"w": normal(1, 36, 5)},
            "a Gemm with factors",
        ),
        ([node("MatMul", "x w", "y")], {"w": normal(1, 3, 3)}, "needs 8 bits"),
        ([node("Add", "x w", "y")], {"w": np.float32([-3e38])}, "no grid of 16 bits resolves"),
    ],
)
def test_what_has_no_lowering_is_refused(nodes: list, constants: dict, reason: str) -> None:
    with pytest.raises(PreconditionError, match=reason):
        gridded(net(nodes, constants, ("n", "m") if nodes[-1].op_type == "Gemm" else ("n", 4, "h", "w")))


def test_what_moves_numbers_to_a_grid_has_it_on_both_sides() -> None:
    constants = {"rows": np.array([0, -1], np.int64), "s": np.float32(1e-4), "z": np.uint16(30000)}
    nodes = [
        node("Tanh", "x", "t"),
        node("Mul", "t t", "m"),
        node("Reshape", "m rows", "r"),
        node("QuantizeLinear", "r s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("Mul", "d d", "y"),
    ]
    graph = gridded(net(nodes, constants, ("n", 36)))

    grids = quantizers_of(graph)

    assert grids["m"] == grids["r"] == (float(np.float32(1e-4)), 30000)
    assert grids["m.real"] != grids["m"]
