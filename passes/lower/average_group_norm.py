"""Compute GroupNormalization from means of channels, for engines that keep channels last.

    m = mean_p x    mu = mean_g m    v = mean_p (x - mu)^2    a = gamma / sqrt(mean_g v + epsilon)
    GroupNormalization(x)  ==  a x + (beta - a mu)

with means over the positions p of a channel, [N, C, 1, ...], and then over the channels g of a group. A group's
values are only next to each other with channels first, so every other form makes OpenVINO turn the layout of each
activation in front of a normalization, and turn it back for the convolution behind. Here the large tensors are read
in either layout. What is computed from the means has one number per channel, [N, G, C / G], and is reshaped at the end.

Runs behind ``FoldRescales``, which looks for the affine of a normalization.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.lower.group_norm import GroupNormPass
from tfmq_export.passes.reading import (
    Shape,
    float_attribute,
    float_values,
    int_attribute,
    known_shape,
    static_size,
)


@dataclass(frozen=True)
class AverageGroupNorm(GroupNormPass):
    """GroupNormalization -> ReduceMean over positions, then over the channels of a group, and one multiply-add."""

    def replace(self, graph: gs.Graph, node: gs.Node) -> None:
        _average(graph, node)

    def obstacle(self, node: gs.Node) -> str | None:
        computed = [value.name for value in node.inputs[1:] if not isinstance(value, gs.Constant)]
        return super().obstacle(node) or (f"its affine {computed[0]} is computed" if computed else None)


def _average(graph: gs.Graph, node: gs.Node) -> None:
    x, scale, bias = node.inputs
    (y,) = node.outputs
    node.outputs.clear()
    name, groups = node.name, int_attribute(node, "num_groups")
    shape, channels = known_shape(x), static_size(x, 1)
    rank = len(shape)
    per_channel = [shape[0], channels, *[1] * (rank - 2)]
    per_group = [shape[0], groups, channels // groups]
    of_group = [shape[0], groups, 1]
    positions = constant(f"{name}_positions", np.arange(2, rank))

    def add(op: str, suffix: str, inputs: Sequence[gs.Tensor], sizes: Shape, **attrs: object) -> gs.Variable:
        result = variable(f"{name}_{suffix}", np.float32, sizes)
        graph.nodes.append(gs.Node(op, f"{name}_{suffix}", attrs, list(inputs), [result]))
        return result

    def mean_of_positions(value: gs.Tensor, suffix: str) -> gs.Variable:
        """One number per channel, those of a group side by side."""
        mean = add("ReduceMean", suffix, [value, positions], per_channel, keepdims=1)
        return add("Reshape", f"{suffix}_grouped", [mean, grouping], per_group)

    def mean_of_group(value: gs.Variable, suffix: str) -> gs.Variable:
        return add("ReduceMean", suffix, [value, last], of_group, keepdims=1)

    def for_channels(value: gs.Variable, suffix: str) -> gs.Variable:
        return add("Reshape", suffix, [value, restoring], per_channel)

    def affine(value: gs.Tensor, suffix: str) -> gs.Constant:
        return constant(f"{name}_{suffix}", float_values(value).reshape(1, groups, -1))

    grouping = constant(f"{name}_grouping", np.array([0, groups, -1]))
    restoring = constant(f"{name}_restoring", np.array([0, channels, *[1] * (rank - 2)]))
    last = constant(f"{name}_last", np.array([2]))
    ones = constant(f"{name}_ones", np.ones((1, 1, channels // groups), np.float32))
    epsilon = constant(f"{name}_epsilon", np.array(float_attribute(node, "epsilon", 1e-5), np.float32))

    mean = mean_of_group(mean_of_positions(x, "channel_mean"), "group_mean")
    mean = add("Mul", "spread_mean", [mean, ones], per_group)
    centred = add("Sub", "centred", [x, for_channels(mean, "mean")], shape)
    square = add("Mul", "square", [centred, centred], shape)
    variance = mean_of_group(mean_of_positions(square, "channel_variance"), "variance")
    padded = add("Add", "padded_variance", [variance, epsilon], of_group)
    deviation = add("Sqrt", "deviation", [padded], of_group)
    gain = add("Div", "group_gain", [affine(scale, "scale"), deviation], per_group)
    moved = add("Mul", "moved_mean", [mean, gain], per_group)
    start = add("Sub", "group_start", [affine(bias, "bias"), moved], per_group)
    gained = add("Mul", "gained", [x, for_channels(gain, "gain")], shape)
    graph.nodes.append(gs.Node("Add", name, inputs=[gained, for_channels(start, "start")], outputs=[y]))
