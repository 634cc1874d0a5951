"""Small denoisers as the exporter writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from nets.onnx_graphs import build, infer, normal
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import (
    SkipSplit,
)
from tfmq_export.recipe.timesteps import TimestepSet

Feeds = dict[str, NDArray]


@dataclass(frozen=True)
class Layer:
    """A layer of a net: the value it reads, and its weight as PyTorch has it."""

    kind: str
    source: str
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class Net:
    """A float graph with inputs ``sample`` and ``timestep``.

    Attributes:
        splits: Layers of the model that its recipe splits.
        split_model: The same function with those layers split by hand; ``layers`` names the halves.
        stacked: Layers whose output takes four codes.
        length: Tokens of its attention; 0 where it has none.
    """

    model: onnx.ModelProto
    layers: Mapping[str, Layer]
    feature: str
    per_sample: bool
    timesteps: TimestepSet
    splits: tuple[SkipSplit, ...] = ()
    split_model: onnx.ModelProto | None = None
    stacked: tuple[str, ...] = ()
    length: int = 0

    def feeds(self, timestep: float, batch: int = 3, seed: int = 0) -> Feeds:
        shape = [dim.dim_value for dim in self.model.graph.input[0].type.tensor_type.shape.dim[1:]]
        rank = len(self.model.graph.input[1].type.tensor_type.shape.dim)
        dtype = self.timesteps.array.dtype
        return {"sample": normal(seed, batch, *shape), "timestep": np.full((1,) * rank, timestep, dtype)}


def observe(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, *, integer: bool = True) -> Feeds:
    """Values of the graph by name; inputs included. For ``integer`` see ``infer``."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in shown.graph.output}
    computed = [name for name in names if name not in feeds]
    for name in computed:
        if name not in known:
            shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    values = dict(zip([value.name for value in shown.graph.output], infer(shown, feeds, integer=integer), strict=True))
    return {name: feeds[name] if name in feeds else values[name] for name in names}


def with_integer_timestep(model: onnx.ModelProto) -> onnx.ModelProto:
    """``build`` makes float inputs only, and infers every type behind them."""
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def node(op: str, inputs: str, output: str, **attrs: object) -> onnx.NodeProto:
    """A node as the exporter names it; inputs and outputs apart by spaces."""
    return helper.make_node(op, inputs.split(), output.split(), name=node_name(output.split()[0]), **attrs)


def split_heads(name: str) -> list[onnx.NodeProto]:
    """A value [N, L, H D] as ``name.heads``, [N, H, L, D]; the constant "split" holds the sizes between."""
    return [
        node("Reshape", f"{name} split", f"{name}.split"),
        node("Transpose", f"{name}.split", f"{name}.heads", perm=[0, 2, 1, 3]),
    ]


def merge_heads(name: str, output: str) -> list[onnx.NodeProto]:
    """And back; the constant "join" holds the sizes."""
    return [node("Transpose", name, "merged", perm=[0, 2, 1, 3]), node("Reshape", "merged join", output)]


def conv_net() -> Net:
    """Convolutions, one with a standardized weight; a temporal embedding of integers is added to their features."""
    kernels = {"conv2d": normal(1, 8, 3, 3, 3), "conv2d_1": normal(2, 8, 2, 3, 3), "conv2d_2": normal(3, 3, 8, 1, 1)}
    raw = kernels["conv2d_1"] + 1
    kernels["conv2d_1"] = raw - raw.mean((1, 2, 3), keepdims=True)
    nodes = [
        node("Shape", "sample", "batch", start=0, end=1),
        node("Expand", "timestep batch", "expand"),
        node("Cast", "expand", "real", to=TensorProto.FLOAT),
        node("Unsqueeze", "real one", "column"),
        node("Mul", "column frequencies", "angles"),
        node("Sin", "angles", "sin"),
        node("Cos", "angles", "cos"),
        node("Concat", "sin cos", "waves", axis=1),
        node("Gemm", "waves in.weight in.bias", "linear", transB=1),
        node("Sigmoid", "linear", "gate"),
        node("Mul", "linear gate", "silu"),
        node("Gemm", "silu out.weight out.bias", "linear_1", transB=1),
        node("Unsqueeze", "linear_1 spatial", "unsqueeze"),
        node("Conv", "sample w b", "conv2d", pads=[1] * 4),
        node("Add", "conv2d unsqueeze", "add"),
        node("GroupNormalization", "add gamma beta", "group_norm", num_groups=2),
        node("Sigmoid", "group_norm", "gate_1"),
        node("Mul", "group_norm gate_1", "silu_1"),
        node("ReduceMean", "raw axes", "mean"),
        node("Sub", "raw mean", "standardized"),
        node("Conv", "silu_1 standardized b1", "conv2d_1", pads=[1] * 4, group=4),
        node("Add", "conv2d_1 conv2d", "add_1"),
        node("Conv", "add_1 w2", "conv2d_2"),
    ]
    constants = {
        "one": np.array([1]),
        "spatial": np.array([2, 3]),
        "axes": np.array([1, 2, 3]),
        "frequencies": np.float32([[1.0, 0.1, 0.01, 0.001]]),
        "in.weight": normal(4, 16, 8),
        "in.bias": normal(5, 16),
        "out.weight": normal(6, 8, 16),
        "out.bias": normal(7, 8),
        "gamma": normal(8, 8),
        "beta": normal(9, 8),
        "w": kernels["conv2d"],
        "b": normal(10, 8),
        "raw": raw,
        "b1": normal(11, 8),
        "w2": kernels["conv2d_2"],
    }
    shape = ("batch", 3, 6, 6)
    model = with_integer_timestep(
        build(nodes, {"sample": shape, "timestep": ("steps",)}, {"conv2d_2": shape}, constants)
    )
    sources = {"conv2d": "sample", "conv2d_1": "silu_1", "conv2d_2": "add_1"}
    layers = {name: Layer("conv", source, kernels[name]) for name, source in sources.items()}
    return Net(model, layers, "linear_1", True, TimestepSet((999, 500, 1, 0)))


def skip_net() -> Net:
    """A strided convolution on a skip concatenation; the prediction, its last layer, has four codes."""
    weights = {"conv2d": normal(1, 6, 3, 3, 3), "conv2d_1": normal(2, 4, 9, 3, 3), "conv2d_2": normal(3, 3, 4, 1, 1)}
    halves = {"conv2d_1_part0": weights["conv2d_1"][:, :6], "conv2d_1_part1": weights["conv2d_1"][:, 6:]}
    before = [
        node("Unsqueeze", "timestep one", "column"),
        node("Mul", "column frequencies", "angles"),
        node("Cos", "angles", "cos"),
        node("Unsqueeze", "cos spatial", "unsqueeze"),
        node("Conv", "sample w b", "conv2d", pads=[1] * 4),
        node("Add", "conv2d unsqueeze", "add"),
        node("Relu", "add", "relu"),
    ]
    attributes = {"pads": [1, 0, 0, 1], "strides": [2, 1]}
    whole = [node("Concat", "relu sample", "cat", axis=1), node("Conv", "cat w1 b1", "conv2d_1", **attributes)]
    split = [
        node("Conv", "relu w1.0 b1", "conv2d_1_part0", **attributes),
        node("Conv", "sample w1.1", "conv2d_1_part1", **attributes),
        node("Add", "conv2d_1_part0 conv2d_1_part1", "conv2d_1"),
    ]
    after = [node("Conv", "conv2d_1 w2 b2", "conv2d_2")]
    constants = {
        "one": np.array([1]),
        "spatial": np.array([2, 3]),
        "frequencies": normal(5, 1, 6),
        "w": weights["conv2d"],
        "b": normal(6, 6),
        "b1": normal(7, 4),
        "w2": weights["conv2d_2"],
        "b2": normal(8, 3),
    }
    inputs = {"sample": ("batch", 3, 6, 6), "timestep": ("steps",)}
    result = {"conv2d_2": ("batch", 3, "h", "w")}
    model = build([*before, *whole, *after], inputs, result, constants | {"w1": weights["conv2d_1"]})
    by_half = {f"w1.{index}": half for index, half in enumerate(halves.values())}
    split_model = build([*before, *split, *after], inputs, result, constants | by_half)
    layers = {
        "conv2d": Layer("conv", "sample", weights["conv2d"]),
        "conv2d_1_part0": Layer("conv", "relu", halves["conv2d_1_part0"]),
        "conv2d_1_part1": Layer("conv", "sample", halves["conv2d_1_part1"]),
        "conv2d_2": Layer("conv", "conv2d_1", weights["conv2d_2"]),
    }
    splits = (SkipSplit("conv2d_1", (6, 3)),)
    return Net(model, layers, "cos", True, TimestepSet((1.5, 0.5, 0.0), real=True), splits, split_model, ("conv2d_2",))


def token_net(length: int = 5, width: int = 8, heads: int = 2) -> Net:
    """Linear layers of rank 3 around attention; one real timestep, of rank 0, for all samples."""
    weights = {name: normal(seed, width, width) for seed, name in enumerate(["linear", "linear_1", "linear_2"])}
    weights["linear_3"] = normal(7, width, width)
    nodes = [
        node("Mul", "timestep frequencies", "angles"),
        node("Sin", "angles", "sin"),
        node("Add", "sample sin", "x"),
    ]
    constants = {
        "frequencies": np.float32(np.exp(-np.arange(width))),
        "split": np.array([-1, length, heads, width // heads]),
        "join": np.array([-1, length, width]),
    }
    for name in weights:
        source = "attended" if name == "linear_3" else "x"
        nodes += [
            node("Transpose", f"{name}.weight", f"{name}.transposed", perm=[1, 0]),
            node("MatMul", f"{source} {name}.transposed", f"{name}.product"),
            node("Add", f"{name}.product {name}.bias", name),
        ]
        constants |= {f"{name}.weight": weights[name], f"{name}.bias": normal(len(constants), width)}
        if name != "linear_3":
            nodes += split_heads(name)
        if name == "linear_2":
            nodes += [
                node("Attention", "linear.heads linear_1.heads linear_2.heads", "attention"),
                *merge_heads("attention", "attended"),
            ]
    nodes.append(node("Add", "linear_3 x", "residual"))
    shape = ("batch", length, width)
    model = build(nodes, {"sample": shape, "timestep": ()}, {"residual": shape}, constants)
    for info in model.graph.value_info:  # the exporter names the batch; inference loses it at Reshape to -1
        if info.name.split(".")[-1] in ("split", "heads", "attention", "merged", "attended"):
            info.type.tensor_type.shape.dim[0].dim_param = "batch"
    layers = {
        name: Layer("linear", "attended" if name == "linear_3" else "x", weight) for name, weight in weights.items()
    }
    return Net(model, layers, "sin", False, TimestepSet((0.75, 0.5, 0.25), real=True), length=length)


def vector_net(width: int = 12, hidden: int = 16) -> Net:
    """Linear layers of rank 2; each sample may bring its own real timestep."""
    weights = {"linear": normal(1, hidden, width), "linear_1": normal(2, width, hidden)}
    nodes = [
        node("Unsqueeze", "timestep one", "column"),
        node("Mul", "column frequencies", "angles"),
        node("Cos", "angles", "cos"),
        node("Gemm", "sample w b", "linear", transB=1),
        node("Add", "linear cos", "add"),
        node("Relu", "add", "relu"),
        node("Gemm", "relu w1 b1", "linear_1", transB=1),
    ]
    constants = {
        "one": np.array([1]),
        "frequencies": normal(5, 1, hidden),
        "w": weights["linear"],
        "b": normal(3, hidden),
        "w1": weights["linear_1"],
        "b1": normal(4, width),
    }
    shape = ("batch", width)
    model = build(nodes, {"sample": shape, "timestep": ("steps",)}, {"linear_1": shape}, constants)
    layers = {
        "linear": Layer("linear", "sample", weights["linear"]),
        "linear_1": Layer("linear", "relu", weights["linear_1"]),
    }
    return Net(model, layers, "cos", True, TimestepSet((1.5, 0.5, 0.0), real=True))
