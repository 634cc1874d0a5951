"""Small Q/DQ graphs, each one pattern that TensorRT keeps in int8, loses in silence, or refuses."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.recipe.names import node_name

BORDER = np.array([0, 0, 1, 1, 0, 0, 1, 1])


class PatternGraph:
    """Collects nodes; every method returns the name of the value it made. ``layer`` names the quantized one."""

    def __init__(self, dtype: type = np.float16, layer: str = "layer") -> None:
        self.dtype = np.dtype(dtype)
        self.layer = layer
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    @property
    def float_type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def input(self, *shape: int | str, name: str = "sample", dtype: int | None = None) -> str:
        name = f"{self.layer}.{name}"
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.float_type, ["batch", *shape]))
        return name

    def constant(self, values: object, dtype: object = None) -> str:
        name = f"{self.layer}.constant_{len(self.constants)}"
        values = np.asarray(values)
        if values.dtype == np.float64:
            values = values.astype(dtype or self.dtype)
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str = "", **attributes: object) -> str:
        output = f"{self.layer}.value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name or f"{output}.{op}", **attributes))
        return output

    def grid(
        self, x: str, scale: object = 0.02, zero_point: NDArray[np.generic] | None = None, dtype: object = None
    ) -> str:
        """QuantizeLinear -> DequantizeLinear; ``dtype`` is the scale's, the graph's own if None."""
        grid = [self.constant(scale, dtype), self.constant(np.int8(0) if zero_point is None else zero_point)]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *grid]), *grid])

    def weight(self, shape: Sequence[int], axis: int = 0, dtype: object = None) -> str:
        channels = shape[axis]
        codes = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        grid = [self.constant(np.full(channels, 0.01), dtype), self.constant(np.zeros(channels, np.int8))]
        return self.node("DequantizeLinear", [codes, *grid], axis=axis)

    def conv(self, x: str, weight: str = "", bias: str = "", pads: int = 1) -> str:
        weight = weight or self.weight((16, 16, 3, 3))
        return self.node(
            "Conv", [x, weight, bias or self.constant(np.full(16, 0.1))], node_name(self.layer), pads=[pads] * 4
        )

    def linear(self, x: str, weight: str = "") -> str:
        product = self.node("MatMul", [x, weight or self.weight((16, 32), 1)], node_name(self.layer))
        return self.node("Add", [product, self.constant(np.full(32, 0.1))])

    def gathered(self, rows: NDArray[np.float64], shape: Sequence[int]) -> str:
        """A row of a table by timestep."""
        name = f"{self.layer}.timestep"
        if not any(value.name == name for value in self.inputs):
            self.input(name="timestep", dtype=TensorProto.INT64)
        row = self.node("Gather", [self.constant(rows), name], axis=0)
        return self.node("Reshape", [row, self.constant(np.asarray(shape))])


Pattern = Callable[[PatternGraph], str]
IMAGE = (16, 8, 8)


def plain(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE)))


def offset_with_exact_border(g: PatternGraph) -> str:
    padded = g.node("Pad", [g.input(*IMAGE), g.constant(BORDER), g.constant(0.0)])
    return g.conv(g.grid(g.node("Add", [padded, g.constant(0.5)])), pads=0)


def factors_before_the_grid(g: PatternGraph) -> str:
    factors = g.constant(np.linspace(0.5, 1, 16).reshape(1, 16, 1, 1))
    return g.conv(g.grid(g.node("Mul", [g.input(*IMAGE), factors])))


def clip_before_the_grid(g: PatternGraph) -> str:
    return g.conv(g.grid(g.node("Clip", [g.input(*IMAGE), g.constant(-1.0), g.constant(1.0)])))


def copies_with_offsets(g: PatternGraph) -> str:
    x = g.node("Concat", [g.input(*IMAGE)] * 3, axis=1)
    x = g.node("Add", [x, g.constant(np.linspace(-1, 1, 48).reshape(1, 48, 1, 1))])
    return g.conv(g.grid(x), g.weight((16, 48, 3, 3)))


def float32_island(g: PatternGraph) -> str:
    x = g.grid(g.node("Cast", [g.input(*IMAGE)], to=TensorProto.FLOAT), dtype=np.float32)
    y = g.conv(x, g.weight((16, 16, 3, 3), dtype=np.float32), g.constant(np.zeros(16, np.float32)))
    return g.node("Cast", [y], to=g.float_type)


def float32_scales_and_casts(g: PatternGraph) -> str:
    x = g.grid(g.node("Cast", [g.input(*IMAGE)], to=TensorProto.FLOAT), dtype=np.float32)
    weight = g.weight((16, 16, 3, 3), dtype=np.float32)
    return g.conv(*(g.node("Cast", [value], to=g.float_type) for value in (x, weight)))


def factors_by_timestep(g: PatternGraph) -> str:
    before = g.gathered(np.linspace(0.5, 1, 10), (-1, 1, 1, 1))
    x = g.grid(g.node("Mul", [g.input(*IMAGE), before]))
    y = g.node("Conv", [x, g.weight((16, 16, 3, 3))], node_name(g.layer), pads=[1] * 4)
    y = g.node("Mul", [y, g.gathered(np.linspace(1, 2, 10), (-1, 1, 1, 1))])
    return g.node("Add", [y, g.gathered(g.rng.standard_normal((10, 16)), (-1, 16, 1, 1))])


def weight_quantized_by_a_node(g: PatternGraph) -> str:
    grid = [g.constant(np.full(16, 0.01)), g.constant(np.zeros(16, np.int8))]
    codes = g.node("QuantizeLinear", [g.constant(g.rng.uniform(-1, 1, (16, 16, 3, 3))), *grid], axis=0)
    return g.conv(g.grid(g.input(*IMAGE)), g.node("DequantizeLinear", [codes, *grid], axis=0))


def layout_behind_the_grid(g: PatternGraph) -> str:
    x = g.node("Reshape", [g.grid(g.input(*IMAGE)), g.constant(np.array([0, 16, 64]))])
    return g.linear(g.node("Transpose", [x], perm=[0, 2, 1]))


def scalar_behind_the_grid(g: PatternGraph) -> str:
    return g.conv(g.node("Mul", [g.grid(g.input(*IMAGE)), g.constant(0.25)]))


def one_output_channel(g: PatternGraph) -> str:
    x = g.grid(g.input(*IMAGE))
    return g.node("Conv", [x, g.weight((1, 16, 3, 3))], node_name(g.layer), pads=[1] * 4)


def linear_on_tokens(g: PatternGraph) -> str:
    return g.linear(g.grid(g.input(64, 16)))


def gemm(g: PatternGraph) -> str:
    inputs = [g.grid(g.input(16)), g.weight((32, 16)), g.constant(np.zeros(32))]
    return g.node("Gemm", inputs, node_name(g.layer), transB=1)


def transposed_weight(g: PatternGraph) -> str:
    weight = g.node("Transpose", [g.weight((32, 16))], perm=[1, 0])
    return g.linear(g.grid(g.input(64, 16)), weight)


def group_norm_and_silu(g: PatternGraph) -> str:
    inputs = [g.input(*IMAGE), g.constant(np.ones(16)), g.constant(np.zeros(16))]
    x = g.node("GroupNormalization", inputs, num_groups=4)
    return g.conv(g.grid(g.node("Mul", [x, g.node("Sigmoid", [x])])))


def zero_pad_and_pool_behind_the_grid(g: PatternGraph) -> str:
    x = g.node("MaxPool", [g.grid(g.input(*IMAGE))], kernel_shape=[2, 2], strides=[2, 2])
    return g.conv(g.node("Pad", [x, g.constant(BORDER), g.constant(0.0)]))


def slices_behind_the_grid(g: PatternGraph) -> str:
    ends = [g.constant(np.array([end])) for end in (0, 16, 1)]
    x = g.node("Slice", [g.grid(g.input(48, 8, 8)), *ends])
    return g.conv(g.node("Gather", [x, g.constant(np.arange(16)[::-1].copy())], axis=1))


def halves_behind_the_grid(g: PatternGraph) -> str:
    halves = [f"{g.layer}.half_{index}" for index in range(2)]
    x = g.grid(g.input(32, 8, 8))
    g.nodes.append(helper.make_node("Split", [x], halves, name=f"{g.layer}.split", axis=1, num_outputs=2))
    return g.node("Add", [g.conv(halves[0]), halves[1]])


def shapes_behind_the_grid(g: PatternGraph) -> str:
    axis = g.constant(np.array([2]))
    x = g.node("Unsqueeze", [g.node("Identity", [g.grid(g.input(*IMAGE))]), axis])
    return g.conv(g.node("Squeeze", [x, axis]))


def flattened_behind_the_grid(g: PatternGraph) -> str:
    x = g.node("Flatten", [g.grid(g.input(4, 4))], axis=1)
    return g.node("Gemm", [x, g.weight((16, 32), 1), g.constant(np.zeros(32))], node_name(g.layer))


def expanded_behind_the_grid(g: PatternGraph) -> str:
    return g.conv(g.node("Expand", [g.grid(g.input(16, 1, 8)), g.constant(np.array([1, 16, 8, 8]))]))


def equal_grids_in_a_concat(g: PatternGraph) -> str:
    parts = [g.grid(g.input(*IMAGE, name=name)) for name in ("sample", "skip")]
    return g.conv(g.node("Concat", parts, axis=1), g.weight((16, 32, 3, 3)))


def three_channels(g: PatternGraph) -> str:
    x = g.grid(g.input(3, 8, 8))
    return g.node("Conv", [x, g.weight((3, 3, 3, 3))], node_name(g.layer), pads=[1] * 4, strides=[2, 2])


def odd_channels(g: PatternGraph) -> str:
    return g.node("Conv", [g.grid(g.input(17, 8, 8)), g.weight((19, 17, 1, 1))], node_name(g.layer))


def signals(g: PatternGraph) -> str:
    return g.node("Conv", [g.grid(g.input(16, 32)), g.weight((16, 16, 3))], node_name(g.layer), pads=[1] * 2)


def volumes(g: PatternGraph) -> str:
    x = g.grid(g.input(16, 4, 8, 8))
    return g.node("Conv", [x, g.weight((16, 16, 3, 3, 3))], node_name(g.layer), pads=[1] * 6)


KEPT: tuple[Pattern, ...] = (
    plain,
    offset_with_exact_border,
    factors_before_the_grid,
    clip_before_the_grid,
    copies_with_offsets,
    float32_island,
    float32_scales_and_casts,
    factors_by_timestep,
    weight_quantized_by_a_node,
    layout_behind_the_grid,
    scalar_behind_the_grid,
    one_output_channel,
    linear_on_tokens,
    gemm,
    transposed_weight,
    group_norm_and_silu,
    zero_pad_and_pool_behind_the_grid,
    slices_behind_the_grid,
    halves_behind_the_grid,
    shapes_behind_the_grid,
    flattened_behind_the_grid,
    expanded_behind_the_grid,
    equal_grids_in_a_concat,
    three_channels,
    odd_channels,
    signals,
    volumes,
)


def scale_of_rank_one(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE), [0.02]))


def factors_behind_the_grid(g: PatternGraph) -> str:
    factors = g.constant(np.linspace(0.5, 1, 16).reshape(1, 16, 1, 1))
    return g.conv(g.node("Mul", [g.grid(g.input(*IMAGE)), factors]))


def pad_with_an_offset_behind_the_grid(g: PatternGraph) -> str:
    return g.conv(g.node("Pad", [g.grid(g.input(*IMAGE)), g.constant(BORDER), g.constant(0.5)]), pads=0)


def relu_behind_the_grid(g: PatternGraph) -> str:
    return g.conv(g.node("Relu", [g.grid(g.input(*IMAGE))]))


def offset_behind_the_grid(g: PatternGraph) -> str:
    return g.conv(g.node("Add", [g.grid(g.input(*IMAGE)), g.constant(0.5)]))


def resize_behind_the_grid(g: PatternGraph) -> str:
    sizes = g.constant(np.array([1, 1, 2, 2], np.float32))
    return g.conv(g.node("Resize", [g.grid(g.input(*IMAGE)), "", sizes], mode="nearest"))


def unequal_grids_in_a_concat(g: PatternGraph) -> str:
    parts = [g.grid(g.input(*IMAGE, name=name), scale) for name, scale in (("sample", 0.02), ("skip", 0.03))]
    return g.conv(g.node("Concat", parts, axis=1), g.weight((16, 32, 3, 3)))


def scale_per_input_channel(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE), np.linspace(0.01, 0.02, 16), np.zeros(16, np.int8)))


def weight_scaled_by_input_channel(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE)), g.weight((16, 16, 3, 3), axis=1))


def linear_scaled_by_input_channel(g: PatternGraph) -> str:
    return g.linear(g.grid(g.input(64, 16)), g.weight((16, 32), axis=0))


def transposed_convolution(g: PatternGraph) -> str:
    inputs = [g.grid(g.input(*IMAGE)), g.weight((16, 16, 2, 2), axis=1)]
    return g.node("ConvTranspose", inputs, node_name(g.layer), strides=[2, 2])


LOST: Mapping[Pattern, str] = {
    scale_of_rank_one: "scale shape",
    factors_behind_the_grid: "op behind grid",
    pad_with_an_offset_behind_the_grid: "op behind grid",
    relu_behind_the_grid: "op behind grid",
    offset_behind_the_grid: "op behind grid",
    resize_behind_the_grid: "op behind grid",
    unequal_grids_in_a_concat: "unequal grids",
    scale_per_input_channel: "per-channel input",
    weight_scaled_by_input_channel: "channel axis",
    linear_scaled_by_input_channel: "channel axis",
    transposed_convolution: "operator",
}
"""Parsed, built, and run in floating point without a word; with the lint's name for it."""


def zero_point_of_five(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE), zero_point=np.int8(5)))


def unsigned_with_zero_point(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE), zero_point=np.uint8(128)))


def int32_bias(g: PatternGraph) -> str:
    parts = [g.constant(np.full(16, 9, np.int32)), g.constant(np.full(16, 2e-4)), g.constant(np.zeros(16, np.int32))]
    return g.conv(g.grid(g.input(*IMAGE)), bias=g.node("DequantizeLinear", parts, axis=0))


def scale_lost_to_float16(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE), 1e-8))


def mixed_operands(g: PatternGraph) -> str:
    return g.conv(g.grid(g.input(*IMAGE)), g.weight((16, 16, 3, 3), dtype=np.float32))


def four_bit_codes(g: PatternGraph) -> str:
    codes = g.constant(g.rng.integers(-8, 8, (16, 16, 3, 3)).astype(ml_dtypes.int4))
    grid = [g.constant(np.full(16, 0.1)), g.constant(np.zeros(16, ml_dtypes.int4))]
    return g.conv(g.grid(g.input(*IMAGE)), g.node("DequantizeLinear", [codes, *grid], axis=0))


def four_bit_codes_in_a_cast(g: PatternGraph) -> str:
    codes = g.constant(g.rng.integers(-8, 8, (16, 16, 3, 3)).astype(ml_dtypes.int4))
    grid = [g.constant(np.full(16, 0.1)), g.constant(np.zeros(16, np.int8))]
    codes = g.node("Cast", [codes], to=TensorProto.INT8)
    return g.conv(g.grid(g.input(*IMAGE)), g.node("DequantizeLinear", [codes, *grid], axis=0))


def bit_shift(g: PatternGraph) -> str:
    codes = g.node("BitShift", [g.input(8, dtype=TensorProto.UINT8), g.constant(np.uint8(2))], direction="LEFT")
    return g.node("Cast", [codes], to=g.float_type)


def computed_scale(g: PatternGraph) -> str:
    g.inputs.append(helper.make_tensor_value_info(f"{g.layer}.timestep", TensorProto.INT64, []))
    scale = g.node("Gather", [g.constant(np.linspace(0.5, 1, 10)), f"{g.layer}.timestep"], axis=0)
    grid = [scale, g.constant(np.int8(0))]
    return g.conv(g.node("DequantizeLinear", [g.node("QuantizeLinear", [g.input(*IMAGE), *grid]), *grid]))


REFUSED: Mapping[Pattern, str] = {
    zero_point_of_five: "zero point",
    unsigned_with_zero_point: "unsigned",
    int32_bias: "int32 bias",
    scale_lost_to_float16: "scale value",
    mixed_operands: "mixed types",
    four_bit_codes: "4-bit codes",
    four_bit_codes_in_a_cast: "4-bit codes",
    bit_shift: "operator",
}
"""Not built at all; with the lint's name for it. ``computed_scale`` even crashes the builder."""


def model_of(*patterns: Pattern, dtype: type = np.float16, opset: int = 23) -> onnx.ModelProto:
    """One graph of some patterns side by side; each one's layer is named after it."""
    parts = [PatternGraph(dtype, pattern.__name__) for pattern in patterns]
    outputs = []
    for pattern, part in zip(patterns, parts, strict=True):
        outputs.append(part.node("Cast", [pattern(part)], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        [node for part in parts for node in part.nodes],
        "patterns",
        [value for part in parts for value in part.inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [tensor for part in parts for tensor in part.constants],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def save(path: Path, *patterns: Pattern, dtype: type = np.float16) -> Path:
    onnx.save(model_of(*patterns, dtype=dtype), path)
    return path
