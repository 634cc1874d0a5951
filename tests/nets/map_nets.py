"""A small denoiser that reads a map as tokens: its positions are merged in front of a norm and a transpose."""

import numpy as np
from nets.onnx_graphs import build, normal
from nets.toy_nets import Layer, Net, node

from tfmq_export.recipe.timesteps import TimestepSet


def map_net(channels: int = 8, height: int = 4, width: int = 3) -> Net:
    """A linear layer on the positions of a convolution's result, as attention in a U-Net reads them."""
    weights = {"conv2d": normal(1, channels, 3, 3, 3), "linear": normal(2, channels, channels)}
    nodes = [
        node("Mul", "timestep frequencies", "angles"),
        node("Sin", "angles", "sin"),
        node("Conv", "sample conv2d.weight conv2d.bias", "conv2d", pads=[1] * 4),
        node("Add", "conv2d sin", "map"),
        node("Reshape", "map merge", "view"),
        node("GroupNormalization", "view gamma beta", "group_norm", num_groups=2),
        node("Transpose", "group_norm", "tokens", perm=[0, 2, 1]),
        node("Transpose", "linear.weight", "linear.transposed", perm=[1, 0]),
        node("MatMul", "tokens linear.transposed", "linear.product"),
        node("Add", "linear.product linear.bias", "linear"),
        node("Einsum", "linear", "turned", equation="nlc->ncl"),
        node("Reshape", "turned apart", "restored"),
        node("Add", "restored map", "residual"),
    ]
    constants = {
        "frequencies": np.float32(np.exp(-np.arange(channels))).reshape(1, channels, 1, 1),
        "merge": np.array([0, channels, -1]),
        "apart": np.array([0, channels, height, width]),
        "gamma": normal(3, channels),
        "beta": normal(4, channels),
        "conv2d.weight": weights["conv2d"],
        "conv2d.bias": normal(5, channels),
        "linear.weight": weights["linear"],
        "linear.bias": normal(6, channels),
    }
    outputs = {"residual": ("batch", channels, height, width)}
    model = build(nodes, {"sample": ("batch", 3, height, width), "timestep": ()}, outputs, constants)
    layers = {
        "conv2d": Layer("conv", "sample", weights["conv2d"]),
        "linear": Layer("linear", "tokens", weights["linear"]),
    }
    return Net(model, layers, "sin", False, TimestepSet((0.75, 0.5, 0.25), real=True))
