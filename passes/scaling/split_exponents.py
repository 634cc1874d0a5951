"""Compute a layer exponent by exponent: power-of-two scaling for integers that leave no room to shift.

    sum_k x_k 2^(d_k) W_k  ==  sum_e 2^e sum_(k: d_k = e) x_k W_k

Each exponent's input channels become a layer of their own on the same activation grid, with the same integers
and ``2^e`` in their scale. A grouped convolution keeps its channels, and zeros stand for those of other exponents.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.bind.bind_recipe import PART, bound_nodes, is_transposed, node_name
from tfmq_export.passes.graph import constant, variable
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe

PARTS = ".parts"
"""What the node that adds them up is called, behind the layer's name."""


@dataclass(frozen=True)
class ExponentPart:
    """The share of one exponent.

    Attributes:
        layer: A layer without exponents: the integers of these channels, and the exponent in their scale.
        own: Which input channels have the exponent, bool [in].
    """

    layer: LayerRecipe
    own: NDArray[np.bool_]


def exponent_parts(layer: LayerRecipe) -> list[ExponentPart]:
    """A layer's parts; the least exponent first, because the bias lies on its accumulator's grid."""
    exponent = layer.pts_exponent
    if exponent is None:
        raise PreconditionError(f"{layer.path}: it has no exponents to split by")
    parts = []
    for index, value in enumerate(np.unique(exponent)):
        own = exponent == value
        part = replace(
            layer,
            name=f"{layer.name}{PART}{index}",
            macs=layer.macs * int(own.sum()) // len(own),
            weight=replace(layer.weight, scale=layer.weight.scale * np.float32(2.0 ** int(value))),
            weight_codes=_own_weights(layer.weight_codes, own, layer.groups),
            les_scale=None,
            pts_exponent=None,
        )
        parts.append(ExponentPart(part, own))
    return parts


def split_recipe(recipe: QuantRecipe, names: frozenset[str]) -> QuantRecipe:
    """The recipe of the graph in which the named layers are split."""
    layers = [
        [part.layer for part in exponent_parts(layer)] if layer.name in names else [layer] for layer in recipe.layers
    ]
    return replace(recipe, layers=tuple(layer for group in layers for layer in group))


@dataclass(frozen=True)
class SplitExponents(Pass):
    """Split the named layers of the recipe.

    Attributes:
        names: Of layers whose weights ``RescaleInputs`` has scaled.
    """

    recipe: QuantRecipe
    names: frozenset[str]
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in self._chosen(graph):
            if layer.output is not None:
                raise PreconditionError(f"{layer.path}: its output has a grid, which its parts cannot have")
            if not isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {node.inputs[1].name} is not a constant")

    def apply(self, graph: gs.Graph) -> Changes:
        notes = []
        for layer, node in self._chosen(graph):
            parts = exponent_parts(layer)
            _split(graph, layer, node, parts)
            notes.append((layer.path, f"power-of-two scaling: split into {len(parts)}"))
        return Changes(tuple(path for path, _ in notes), notes=tuple(notes))

    def _chosen(self, graph: gs.Graph) -> list[tuple[LayerRecipe, gs.Node]]:
        return bound_nodes(graph, self.recipe, self.names)


def _own_weights(weight: NDArray[Any], own: NDArray[np.bool_], groups: int) -> NDArray[Any]:
    """The weights of some input channels; of a grouped convolution, with zeros for the other channels.

    Args:
        weight: [out, in / groups, ...].
    """
    if groups == 1:
        return weight[:, own]
    reads = np.repeat(own.reshape(groups, -1), len(weight) // groups, axis=0)  # [out, in / groups]
    return np.where(reads.reshape(*reads.shape, *[1] * (weight.ndim - 2)), weight, weight.dtype.type(0))


def _split(graph: gs.Graph, layer: LayerRecipe, node: gs.Node, parts: list[ExponentPart]) -> None:
    source, bias, transposed = node.inputs[0], node.inputs[2:], is_transposed(node)
    weight = node.inputs[1].values.T if transposed else node.inputs[1].values
    (result,) = node.outputs
    results = []
    for index, part in enumerate(parts):
        name = part.layer.name
        read = source
        if layer.groups == 1:
            read = _gather(graph, source, np.flatnonzero(part.own), 1 if node.op == "Conv" else -1, name)
        values = _own_weights(weight, part.own, layer.groups)
        partial = variable(name, dtype=result.dtype, shape=result.shape)
        inputs = [read, constant(f"{name}.weight", values.T if transposed else values)]
        inputs += bias if index == 0 else []
        graph.nodes.append(gs.Node(node.op, node_name(part.layer), dict(node.attrs), inputs, [partial]))
        results.append(partial)
    node.outputs.clear()
    graph.nodes.append(gs.Node("Sum", f"{layer.name}{PARTS}", inputs=results, outputs=[result]))


def _gather(graph: gs.Graph, source: gs.Tensor, channels: NDArray[np.int64], axis: int, name: str) -> gs.Variable:
    shape = None
    if source.shape is not None:
        shape = list(source.shape)
        shape[axis] = len(channels)
    gathered = variable(f"{name}.input", dtype=source.dtype, shape=shape)
    inputs = [source, constant(f"{name}.channels", channels)]
    graph.nodes.append(gs.Node("Gather", f"{name}.gather", {"axis": axis}, inputs=inputs, outputs=[gathered]))
    return gathered
