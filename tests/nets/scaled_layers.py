"""Layers with equivalent scaling and power-of-two exponents, and what they compute, written out once more."""

from dataclasses import replace

import numpy as np
import onnx
import torch
from nets.onnx_graphs import build, normal
from nets.toy_nets import node
from nets.toy_recipes import layer_recipe, per_channel
from numpy.typing import NDArray

from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe

OPS = ("Conv", "grouped Conv", "MatMul", "Gemm", "Gemm transposed")
CHANNELS = 4
OUT = 6


def input_channels(op: str) -> NDArray[np.int64]:
    """Which input channel each weight multiplies, [out, in / groups]."""
    if op != "grouped Conv":
        return np.tile(np.arange(CHANNELS), (OUT, 1))
    return np.array([[0, 1]] * 3 + [[2, 3]] * 3)  # the first three outputs read the first two channels


def per_weight(op: str, channel_factor: NDArray, weight: NDArray) -> NDArray:
    """A factor per input channel, against a weight."""
    factor = channel_factor[input_channels(op)]
    return factor.reshape(*factor.shape, *[1] * (weight.ndim - 2))


def float_weight(op: str) -> NDArray[np.float32]:
    fan_in = input_channels(op).shape[1]
    return normal(0, OUT, fan_in, 3, 3) if "Conv" in op else normal(0, OUT, fan_in)


def name_of(op: str) -> str:
    return "conv2d" if "Conv" in op else "linear"


def float_model(op: str, weight: NDArray, bias: NDArray) -> onnx.ModelProto:
    name = name_of(op)
    if name == "conv2d":
        nodes = [node("Conv", "x w b", name, pads=[1] * 4, group=2 if op == "grouped Conv" else 1)]
        shapes = ("n", CHANNELS, 5, 5), ("n", OUT, 5, 5)
    elif op == "MatMul":
        nodes = [node("MatMul", "x w", "product"), node("Add", "product b", name)]
        shapes, weight = (("n", 3, CHANNELS), ("n", 3, OUT)), weight.T.copy()
    else:
        transposed = op == "Gemm transposed"
        nodes = [node("Gemm", "x w b", name, transB=int(transposed))]
        shapes, weight = (("n", CHANNELS), ("n", OUT)), weight if transposed else weight.T.copy()
    return build(nodes, {"x": shapes[0]}, {name: shapes[1]}, {"w": weight, "b": bias})


def sample(op: str, seed: int = 2) -> NDArray[np.float32]:
    """Channels of very different ranges."""
    shape = (2, CHANNELS, 5, 5) if "Conv" in op else (2, 3, CHANNELS) if op == "MatMul" else (2, CHANNELS)
    return normal(seed, *shape) * on_channels(op, np.float32([1, 4, 0.5, 2]))


def on_channels(op: str, factor: NDArray) -> NDArray:
    return factor.reshape(-1, 1, 1) if "Conv" in op else factor


def input_grid(scale: float, zero_point: int, codes: int = 1, bits: int = 8) -> QParams:
    spec = QuantSpec(bits, signed=False, codes=codes)
    return QParams(spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


def scaled_layer(
    op: str, x: QParams, y: QParams | None, bits: int, tau: NDArray | None, exponent: NDArray | None
) -> LayerRecipe:
    weight = float_weight(op)
    if tau is not None:
        weight = (weight * per_weight(op, tau, weight)).astype(np.float32)
    layer = layer_recipe(name_of(op), "conv" if "Conv" in op else "linear", weight, x, y, bits)
    return replace(layer, groups=2 if op == "grouped Conv" else 1, les_scale=tau, pts_exponent=exponent)


def computed(op: str, layer: LayerRecipe, bias: NDArray, x: NDArray) -> NDArray[np.float64]:
    """``sum_k x^_k 2^d_k W^_k + b`` with ``x^ = fake_quantize(x / (tau 2^d))``, in float64; output not quantized."""
    tau = np.ones(CHANNELS) if layer.les_scale is None else layer.les_scale.astype(np.float64)
    shift = np.ones(CHANNELS) if layer.pts_exponent is None else 2.0 ** layer.pts_exponent.astype(np.float64)
    scaled = x * on_channels(op, (1 / (tau * shift)).astype(np.float32))  # as graphs multiply: in fp32
    codes = np.clip(np.rint(scaled / layer.input.scale) + layer.input.zero_point, 0, layer.input.spec.qmax)
    on_grid = (codes.astype(np.float64) - layer.input.zero_point) * float(layer.input.scale)
    weight = layer.weight_codes * per_channel(layer.weight.scale.astype(np.float64), layer.weight_codes.ndim)
    weight = weight * per_weight(op, shift, weight)
    if op != "MatMul":  # a MatMul adds its bias in floating point; the others on the accumulator's grid
        step = layer.input.scale.astype(np.float64) * layer.weight.scale * shift.min()
        bias = np.rint(bias / step) * step
    if "Conv" not in op:
        return np.asarray(on_grid @ weight.T + bias)
    y = torch.nn.functional.conv2d(torch.from_numpy(on_grid), torch.from_numpy(weight), padding=1, groups=layer.groups)
    return np.asarray(y.numpy() + bias[:, None, None])
