from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.toy_nets import node
from numpy.typing import NDArray

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.split_skips import SplitSkips
from tfmq_export.passes.graph import export_model
from tfmq_export.recipe.recipe import SkipSplit

FP32_ROUNDING = 1e-5
"""Of the largest output: two sums instead of one, of at most 3 * 5 * 9 terms of order 1."""


def split(model: onnx.ModelProto, name: str, sizes: tuple[int, ...]) -> gs.Graph:
    graph = graph_of(model)
    run_passes(graph, [SplitSkips((SkipSplit(name, sizes),))])
    return graph


def feeds_of(model: onnx.ModelProto, batch: int = 2) -> dict[str, NDArray]:
    shapes = {
        value.name: [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    return {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


def assert_law(model: onnx.ModelProto, graph: gs.Graph) -> None:
    """The same function, to the last few bits."""
    feeds = feeds_of(model)
    (expected,), (actual,) = infer(model, feeds), infer(export_model(graph), feeds)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FP32_ROUNDING * np.abs(expected).max())


def part_names(sizes: tuple[int, ...]) -> list[str]:
    return [f"in{index}" for index in range(len(sizes))]


def conv_model(
    sizes: tuple[int, ...],
    out: int = 3,
    size: int = 6,
    *,
    kernel: int = 3,
    bias: bool = True,
    group: int = 1,
    **attrs: object,
) -> onnx.ModelProto:
    names = part_names(sizes)
    fan_in = sum(sizes) // group
    nodes = [
        node("Concat", " ".join(names), "cat", axis=1),
        node("Conv", "cat w b" if bias else "cat w", "conv2d", group=group, **attrs),
    ]
    inputs = {name: ("n", channels, size, size) for name, channels in zip(names, sizes, strict=True)}
    weights = {"w": normal(10, out, fan_in, kernel, kernel), **({"b": normal(11, out)} if bias else {})}
    return build(nodes, inputs, {"conv2d": ("n", out, "h", "w")}, weights)


def linear_model(op: str, sizes: tuple[int, ...], out: int = 3, *, bias: bool = True) -> onnx.ModelProto:
    """``op`` is MatMul (behind it an Add), Gemm, or Gemm with a transposed weight."""
    names = part_names(sizes)
    nodes = [node("Concat", " ".join(names), "cat", axis=-1)]
    weight = normal(10, sum(sizes), out)
    if op == "MatMul":
        nodes += (
            [node("MatMul", "cat w", "product"), node("Add", "product b", "linear")]
            if bias
            else [node("MatMul", "cat w", "linear")]
        )
    else:
        transposed = op == "Gemm transposed"
        weight = weight.T.copy() if transposed else weight
        nodes.append(node("Gemm", "cat w b" if bias else "cat w", "linear", transB=int(transposed)))
    middle = (4,) if op == "MatMul" else ()
    inputs = {name: ("n", *middle, channels) for name, channels in zip(names, sizes, strict=True)}
    constants = {"w": weight, **({"b": normal(11, out)} if bias else {})}
    return build(nodes, inputs, {"linear": ("n", *middle, out)}, constants)


SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    out=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_a_convolution_is_the_sum_of_its_halves(
    sizes: tuple[int, ...], out: int, kernel: int, stride: int, pads: list[int], bias: bool
) -> None:
    model = conv_model(sizes, out, kernel=kernel, bias=bias, strides=[stride] * 2, pads=pads)

    graph = split(model, "conv2d", sizes)

    assert_law(model, graph)
    assert "Concat" not in ops(graph)
    assert ops(graph).count("Conv") == len(sizes)


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(["MatMul", "Gemm", "Gemm transposed"]), sizes=SIZES, out=st.integers(1, 4), bias=st.booleans()
)
def test_a_linear_layer_is_the_sum_of_its_halves(op: str, sizes: tuple[int, ...], out: int, bias: bool) -> None:
    model = linear_model(op, sizes, out, bias=bias)

    graph = split(model, "linear", sizes)

    assert_law(model, graph)
    assert "Concat" not in ops(graph)
    assert ops(graph).count(op.split()[0]) == len(sizes)


@pytest.mark.parametrize("make", [conv_model, lambda sizes: linear_model("MatMul", sizes)], ids=["conv", "linear"])
def test_each_half_computes_the_value_the_recipe_names(make: Callable[[tuple[int, ...]], onnx.ModelProto]) -> None:
    model = make((2, 3))
    (whole,) = [value.name for value in model.graph.output]

    graph = split(model, whole, (2, 3))

    values = graph.tensors()
    assert {f"{whole}_part0", f"{whole}_part1"} <= set(values)
    for index in range(2):
        graph.outputs.append(values[f"{whole}_part{index}"])
    # The bias is added once, to the first half.
    total, first, second = infer(export_model(graph), feeds_of(model))
    np.testing.assert_array_equal(first + second, total)
    silent = feeds_of(model) | {"in1": np.zeros_like(feeds_of(model)["in1"])}
    assert not infer(export_model(graph), silent)[2].any()


def test_the_law_can_fail() -> None:
    model = conv_model((2, 3))
    graph = split(model, "conv2d", (2, 3))
    half = graph.tensors()["conv2d_part1.weight"]
    half.values = half.values[:, ::-1].copy()

    with pytest.raises(AssertionError):
        assert_law(model, graph)


def test_another_reader_of_the_concatenation_keeps_it() -> None:
    nodes = [
        node("Concat", "in0 in1", "cat", axis=1),
        node("Conv", "cat w", "conv2d"),
        node("Relu", "cat", "relu"),
    ]
    shape = ("n", 2, 4, 4)
    outputs = {"conv2d": ("n", 3, 4, 4), "relu": ("n", 4, 4, 4)}
    model = build(nodes, {"in0": shape, "in1": shape}, outputs, {"w": normal(0, 3, 4, 1, 1)})

    graph = split(model, "conv2d", (2, 2))

    for actual, expected in zip(
        infer(export_model(graph), feeds_of(model)), infer(model, feeds_of(model)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=FP32_ROUNDING * np.abs(expected).max())


def not_a_concat() -> onnx.ModelProto:
    shape = ("n", 4, 4, 4)
    nodes = [node("Relu", "in0", "relu"), node("Conv", "relu w", "conv2d")]
    return build(nodes, {"in0": shape}, {"conv2d": shape}, {"w": normal(0, 4, 4, 1, 1)})


def straight_from_the_input() -> onnx.ModelProto:
    shape = ("n", 4, 4, 4)
    return build([node("Conv", "in0 w", "conv2d")], {"in0": shape}, {"conv2d": shape}, {"w": normal(0, 4, 4, 1, 1)})


def a_computed_weight() -> onnx.ModelProto:
    nodes = [
        node("Concat", "in0 in1", "cat", axis=1),
        node("Relu", "raw", "w"),
        node("Conv", "cat w", "conv2d"),
    ]
    shape = ("n", 2, 4, 4)
    return build(nodes, {"in0": shape, "in1": shape}, {"conv2d": ("n", 3, 4, 4)}, {"raw": normal(0, 3, 4, 1, 1)})


def another_operation() -> onnx.ModelProto:
    nodes = [node("Concat", "in0 in1", "cat", axis=1), node("Relu", "cat", "conv2d")]
    shape = ("n", 2, 4, 4)
    return build(nodes, {"in0": shape, "in1": shape}, {"conv2d": ("n", 4, 4, 4)})


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: conv_model((2, 2), 4, group=2), "conv2d", "conv2d: a grouped convolution cannot be split"),
        (not_a_concat, "conv2d", "conv2d: its input is not a concatenation of 2 values"),
        (straight_from_the_input, "conv2d", "conv2d: its input is not a concatenation of 2 values"),
        (lambda: conv_model((2, 1, 1)), "conv2d", "conv2d: its input is not a concatenation of 2 values"),
        (a_computed_weight, "conv2d", "conv2d: its weight is not a constant; fold constants first"),
        (another_operation, "conv2d", "conv2d: computed by Relu, which cannot be split"),
        (lambda: conv_model((2, 2)), "conv2d_9", "conv2d_9: no such value in the graph; was the recipe made from"),
        (lambda: conv_model((2, 2)), "in0", "in0: no such value in the graph; was the recipe made from"),
    ],
)
def test_what_cannot_be_split_is_refused(make: Callable[[], onnx.ModelProto], name: str, message: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        split(make(), name, (2, 2))
    assert str(caught.value).startswith(message)
