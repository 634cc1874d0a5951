"""Compute a layer part by part where its result is split.

    Split(x W + b)  ==  x W_0 + b_0, x W_1 + b_1, ...

The gate and the value of a gated unit (GEGLU), or q, k and v out of one projection, then never lie in one tensor that
has to be copied apart, and what follows a part is fused with it. Each output channel keeps its weights, its scale and
its bias, and the parts read one input through one grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes, is_transposed
from tfmq_export.passes.graph import constant, read_instead, variable
from tfmq_export.passes.reading import constant_values, static_size
from tfmq_export.recipe.names import node_name, part_name
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe

Sizes = Mapping[str, tuple[int, ...]]
"""Output channels of each part, by the layer's name."""


def results_to_split(graph: gs.Graph, recipe: QuantRecipe) -> Sizes:
    """The layers whose result goes into a Split along its channels and nowhere else.

    Args:
        recipe: Adapted to the target.
    """
    values, found = graph.tensors(), {}
    for layer in recipe.layers:
        split = _splitting(graph, values.get(layer.name), layer)
        if split is not None and _obstacle(layer) is None:
            found[layer.name] = tuple(static_size(part, _axis(layer)) for part in split.outputs)
    return found


def split_layers(recipe: QuantRecipe, sizes: Sizes) -> QuantRecipe:
    """The recipe of the graph in which the results of these layers are computed in parts."""
    layers = [result_parts(layer, sizes[layer.name]) if layer.name in sizes else [layer] for layer in recipe.layers]
    return replace(recipe, layers=tuple(layer for group in layers for layer in group))


def result_parts(layer: LayerRecipe, sizes: tuple[int, ...]) -> list[LayerRecipe]:
    """A layer's share of some output channels each.

    Raises:
        PreconditionError: they are not all of its channels.
    """
    if sum(sizes) != len(layer.weight_codes):
        raise PreconditionError(f"{layer.path}: has {len(layer.weight_codes)} channels, its parts {sum(sizes)}")
    starts = np.cumsum((0, *sizes))
    return [
        replace(
            layer,
            name=part_name(layer.name, index),
            macs=layer.macs * size // sum(sizes),
            weight=replace(
                layer.weight,
                scale=layer.weight.scale[start : start + size],
                zero_point=layer.weight.zero_point[start : start + size],
            ),
            weight_codes=layer.weight_codes[start : start + size],
        )
        for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


@dataclass(frozen=True)
class SplitResults(RecipePass):
    """Split layers; runs behind ``RescaleInputs`` and before ``InsertQdq``, which gets the recipe of the parts.

    Attributes:
        sizes: Of the layers to split; None splits each that can be (``results_to_split``).
    """

    sizes: Sizes | None = None
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        values = graph.tensors()
        for layer, node in bound_nodes(graph, self.recipe, self._sizes(graph)):
            if _splitting(graph, values.get(layer.name), layer) is None:
                raise PreconditionError(f"{layer.path}: its result is not split along its channels")
            reason = _obstacle(layer)
            if reason is not None:
                raise PreconditionError(f"{layer.path}: {reason}, so it cannot be computed in parts")
            if not isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {node.inputs[1].name} is not a constant")
            for bias in _bias(node, values[layer.name]):
                if not isinstance(bias, gs.Constant) or bias.shape[-1] != len(layer.weight_codes):
                    raise PreconditionError(f"{layer.path}: its bias {bias.name} has no constant for each channel")

    def apply(self, graph: gs.Graph) -> Changes:
        values, sizes = graph.tensors(), self._sizes(graph)
        chosen = bound_nodes(graph, self.recipe, sizes)
        for layer, node in chosen:
            _split(graph, node, values[layer.name], result_parts(layer, sizes[layer.name]))
        changed = tuple(layer.path for layer, _ in chosen)
        return Changes(changed, parts=sizes, recipe=split_layers(self.recipe, sizes))

    def ensures(self, graph: gs.Graph) -> None:
        names, sizes = {node.name for node in graph.nodes}, self._sizes(graph)
        for layer in self.recipe.layers:
            if layer.name in sizes and node_name(layer.name) in names:
                raise PostconditionError(f"{layer.path}: still computes all parts at once")

    def _sizes(self, graph: gs.Graph) -> Sizes:
        return results_to_split(graph, self.recipe) if self.sizes is None else self.sizes


def _axis(layer: LayerRecipe) -> int:
    return 1 if layer.kind == "conv" else -1


def _obstacle(layer: LayerRecipe) -> str | None:
    if layer.output is not None:
        return "its output has a grid"
    return "it has groups" if layer.groups != 1 else None


def _splitting(graph: gs.Graph, value: gs.Tensor | None, layer: LayerRecipe) -> gs.Node | None:
    """The Split that alone reads a layer's result, into parts of known sizes that nodes read, and only nodes."""
    if value is None or value.shape is None or [reader.op for reader in value.outputs] != ["Split"]:
        return None
    (split,) = value.outputs
    ends = {id(output) for output in graph.outputs}
    free = not any(id(part) in ends for part in (value, *split.outputs))
    along_channels = split.attrs.get("axis", 0) in (_axis(layer), _axis(layer) % len(value.shape))
    known = all(part.shape is not None and isinstance(part.shape[_axis(layer)], int) for part in split.outputs)
    read = all(part.outputs for part in split.outputs)
    return split if free and along_channels and known and read else None


def _bias(node: gs.Node, result: gs.Tensor) -> list[gs.Tensor]:
    """What is added to a product, in its own node or in the one behind it; at most one."""
    if result.inputs[0] is node:
        return list(node.inputs[2:])
    return [value for value in result.inputs[0].inputs if not value.inputs or value.inputs[0] is not node]


def _split(graph: gs.Graph, node: gs.Node, result: gs.Tensor, parts: list[LayerRecipe]) -> None:
    (split,) = result.outputs
    behind = result.inputs[0] is not node
    ends = np.cumsum([len(part.weight_codes) for part in parts])[:-1]
    weights = np.split(constant_values(node.inputs[1]), ends, 1 if is_transposed(node) else 0)
    biases = [np.split(constant_values(bias), ends, -1) for bias in _bias(node, result)]
    for index, (part, old) in enumerate(zip(parts, list(split.outputs), strict=True)):
        new = variable(part.name, old.dtype, old.shape)
        inputs = [node.inputs[0], constant(f"{part.name}.weight", weights[index])]
        bias = [constant(f"{part.name}.bias", share[index]) for share in biases]
        if behind:
            product = variable(f"{part.name}.product", old.dtype, old.shape)
            graph.nodes.append(gs.Node(node.op, node_name(part.name), dict(node.attrs), inputs, [product]))
            graph.nodes.append(gs.Node("Add", f"{part.name}.add_bias", inputs=[product, *bias], outputs=[new]))
        else:
            graph.nodes.append(gs.Node(node.op, node_name(part.name), dict(node.attrs), [*inputs, *bias], [new]))
        read_instead(old, new)
    split.inputs.clear()
    split.outputs.clear()
    node.outputs.clear()
