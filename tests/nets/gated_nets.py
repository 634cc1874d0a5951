"""A small denoiser with a gated unit: one linear layer computes the value and its gate."""

import numpy as np
from nets.onnx_graphs import build, normal
from nets.toy_nets import Layer, Net, node

from tfmq_export.recipe.timesteps import TimestepSet


def gated_net(length: int = 5, width: int = 8, inner: int = 6) -> Net:
    """``linear_1(value gelu(gate))`` behind a linear layer of rank 3 whose result is split; one real timestep."""
    weights = {"linear": normal(1, 2 * inner, width), "linear_1": normal(2, width, inner)}
    nodes = [
        node("Mul", "timestep frequencies", "angles"),
        node("Sin", "angles", "sin"),
        node("Add", "sample sin", "x"),
        node("Transpose", "linear.weight", "linear.transposed", perm=[1, 0]),
        node("MatMul", "x linear.transposed", "linear.product"),
        node("Add", "linear.product linear.bias", "linear"),
        node("Split", "linear", "value gate", axis=2, num_outputs=2),
        node("Gelu", "gate", "gelu"),
        node("Mul", "value gelu", "gated"),
        node("Transpose", "linear_1.weight", "linear_1.transposed", perm=[1, 0]),
        node("MatMul", "gated linear_1.transposed", "linear_1.product"),
        node("Add", "linear_1.product linear_1.bias", "linear_1"),
        node("Add", "linear_1 x", "residual"),
    ]
    constants = {
        "frequencies": np.float32(np.exp(-np.arange(width))),
        **{f"{name}.weight": weight for name, weight in weights.items()},
        "linear.bias": normal(3, 2 * inner),
        "linear_1.bias": normal(4, width),
    }
    shape = ("batch", length, width)
    model = build(nodes, {"sample": shape, "timestep": ()}, {"residual": shape}, constants)
    layers = {
        "linear": Layer("linear", "x", weights["linear"]),
        "linear_1": Layer("linear", "gated", weights["linear_1"]),
    }
    return Net(model, layers, "sin", False, TimestepSet((0.75, 0.5, 0.25), real=True))
