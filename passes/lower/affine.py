"""Spell the affine of a normalization out.

    BatchNormalization(x; g, b, m, v)  ==  Conv(x; g', b - m g')      g' = g / sqrt(v + epsilon), one tap per channel
    LayerNormalization(x; g, b)        ==  LayerNormalization(x; 1) * g + b

An engine of integers alone takes scale and bias of a norm on coarse grids, of 8 bits. A convolution of each channel
with one number has a scale for each, on which that number lies exactly, and a bias of 32 bits. Constants of Mul and
Add have 16 bits; a scale of 1 lies on any grid. Runs behind ``FoldRescales``, which looks for affines.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import double_values, float_attribute, rank_of


@dataclass(frozen=True)
class SpellAffine(Pass):
    """BatchNormalization -> depthwise Conv; LayerNormalization -> LayerNormalization without affine, Mul, Add."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        changed, skipped = [], []
        for node in [node for node in graph.nodes if node.op in ("BatchNormalization", "LayerNormalization")]:
            reason = _obstacle(node)
            if reason:
                skipped.append((node.name, reason))
                continue
            changed.append(node.name)
            if node.op == "BatchNormalization":
                _spell_batch_norm(graph, node)
            else:
                _spell_layer_norm(graph, node)
        return Changes(tuple(changed), tuple(skipped))

    def ensures(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.op == "BatchNormalization" and not _obstacle(node):
                raise PostconditionError(f"{node.name}: still a BatchNormalization")


def _obstacle(node: gs.Node) -> str:
    """Why one stays as it is; empty where nothing is in the way."""
    if not all(isinstance(value, gs.Constant) for value in node.inputs[1:]):
        return "its affine is computed"
    if len(node.outputs) > 1:
        return "more than its result is read"
    if node.op == "LayerNormalization" and rank_of(node.inputs[1]) != 1:
        return f"its affine has {rank_of(node.inputs[1])} axes"
    return ""


def _spell_batch_norm(graph: gs.Graph, node: gs.Node) -> None:
    x, (scale, bias, mean, variance) = node.inputs[0], map(double_values, node.inputs[1:5])
    gain = scale / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
    name, channels, ones = node.name, len(gain), [1] * (rank_of(x) - 2)
    weight = constant(f"{name}_gain", gain.astype(np.float32).reshape(channels, 1, *ones))
    start = constant(f"{name}_start", (bias - mean * gain).astype(np.float32))
    node.op, node.inputs = "Conv", [x, weight, start]
    node.attrs = {"group": channels, "kernel_shape": ones}


def _spell_layer_norm(graph: gs.Graph, node: gs.Node) -> None:
    gain = double_values(node.inputs[1])
    bias = double_values(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gain)
    if (gain == 1).all() and not bias.any():
        return
    result, name = node.outputs[0], node.name
    normalized, scaled = (variable(f"{name}_{part}", np.float32, result.shape) for part in ("normalized", "scaled"))
    node.inputs = [node.inputs[0], constant(f"{name}_unit_scale", np.ones(gain.shape, np.float32))]
    node.outputs = [normalized]
    factor, start = (
        constant(f"{name}_{part}", values.astype(np.float32)) for part, values in (("gain", gain), ("start", bias))
    )
    graph.nodes += [
        gs.Node("Mul", f"{name}_scale", inputs=[normalized, factor], outputs=[scaled]),
        gs.Node("Add", f"{name}_shift", inputs=[scaled, start], outputs=[result]),
    ]
