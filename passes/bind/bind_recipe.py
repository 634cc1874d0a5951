"""Find each layer of the recipe in the graph and bring it into one shape.

    conv     Conv(x, W, b)
    linear   MatMul(x, W^T) [+ Add b]     or, for inputs of rank 2,     Gemm(x, W, b, transB=1)

The bias of a MatMul becomes [1, 1, out]: one of rank 1 lets ONNX Runtime fuse MatMul and Add to a Gemm
with a float bias, which silently runs in fp32 where shapes are static.

The exporter names values after the captured graph, so a layer is found by the value it computes. The
node that multiplies is renamed ``node_<layer>``; ``InsertQdq`` and ``QuantizeWeights`` look it up there.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.graph import constant
from tfmq_export.passes.reading import int_attribute
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe
from tfmq_export.recipe.stored_layer import StoredLayer

COMPUTES = {"conv": ("Conv",), "linear": ("MatMul", "Gemm")}


def bound_nodes(
    graph: gs.Graph, recipe: QuantRecipe, names: Container[str] | None = None
) -> list[tuple[LayerRecipe, gs.Node]]:
    """Each layer with the node that ``BindRecipe`` named after it.

    Args:
        names: Of the layers to look for; all if None.
    Raises:
        PreconditionError: a layer has none.
    """
    nodes = {node.name: node for node in graph.nodes}
    layers = [layer for layer in recipe.layers if names is None or layer.name in names]
    for layer in layers:
        if node_name(layer.name) not in nodes:
            raise PreconditionError(f"{layer.path}: no node {node_name(layer.name)}; run BindRecipe first")
    return [(layer, nodes[node_name(layer.name)]) for layer in layers]


def is_transposed(node: gs.Node) -> bool:
    """Whether the node that multiplies reads its weight as [in, out]."""
    return node.op == "MatMul" or (node.op == "Gemm" and not int_attribute(node, "transB", 0))


@dataclass(frozen=True)
class BindRecipe(RecipePass):
    """Name the multiplying node of every layer after the layer."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        values = graph.tensors()
        layers: list[LayerRecipe | StoredLayer] = [*self.recipe.layers, *self.recipe.stored]
        found = {layer.name: _multiplier(layer, values) for layer in layers}
        taken = {node_name(layer.name) for layer in layers}
        for node in graph.nodes:
            if node.name in taken:
                node.name = f"{node.name}.rest"
        for layer in layers:
            node = found[layer.name]
            node.name = node_name(layer.name)
            shape = node.outputs[0].shape
            if node.op == "MatMul" and (shape is None or len(shape) > 2):  # a result of rank 2 would change shape
                _raise_bias_rank(node)
        return Changes(tuple(layer.path for layer in layers))


def _raise_bias_rank(product: gs.Node) -> None:
    for add in product.outputs[0].outputs:
        for position, bias in enumerate(add.inputs):
            if add.op == "Add" and isinstance(bias, gs.Constant) and len(bias.shape) == 1:
                add.inputs[position] = constant(f"{bias.name}.{product.name}", bias.values.reshape(1, 1, -1))


def _multiplier(layer: LayerRecipe | StoredLayer, values: Mapping[str, gs.Tensor]) -> gs.Node:
    value = values.get(layer.name)
    if value is None or not value.inputs:
        raise PreconditionError(
            f"{layer.path}: no value {layer.name} in the graph; was the recipe made from another model?"
        )
    node = value.inputs[0]
    if node.op == "Add" and layer.kind == "linear":
        products = [x.inputs[0] for x in node.inputs if x.inputs and x.inputs[0].op == "MatMul"]
        if len(products) == 1:
            node = products[0]
    if node.op not in COMPUTES[layer.kind]:
        raise PreconditionError(
            f"{layer.path}: {layer.name} is computed by {node.op}, not by {COMPUTES[layer.kind][0]}"
        )
    if not isinstance(node.inputs[1], gs.Constant):
        raise PreconditionError(f"{layer.path}: its weight is not a constant; fold constants first")
    return node
