"""Put grids on both factors of attention's products.

    q -> Q -> DQ -> MatMul -> Softmax -> Q -> DQ -> MatMul
    k^T -> Q -> DQ --'              v -> Q -> DQ --'

The scores and the result stay in floating point: every engine that has the kernels takes two quantized factors without
a quantized result, and 256 levels are too few for scores (docs/lowering.md). Runs behind ``LowerAttention``. A product
is found by the value it computes; its node is renamed ``node_<product>``, as those of layers are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.qdq.activation_codes import is_dequantized, quantize_dequantize
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import ProductRecipe, QuantRecipe
from tfmq_export.target import Target


@dataclass(frozen=True)
class QuantizeAttention(RecipePass):
    """Quantize the factors of every product of the recipe."""

    target: Target
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        values = graph.tensors()
        for product in self.recipe.products:
            node = _multiplier(product, values)
            for factor in node.inputs:
                if isinstance(factor, gs.Constant):
                    raise PreconditionError(f"{product.path}: its factor {factor.name} is a constant")
                if is_dequantized(factor):
                    raise PreconditionError(f"{product.path}: its factor {factor.name} is quantized already")
            if self.target.symmetric and not product.left.spec.signed:
                raise PreconditionError(f"{product.path}: {self.target.name} needs a signed grid; adapt the recipe")

    def apply(self, graph: gs.Graph) -> Changes:
        values = graph.tensors()
        found = [(product, _multiplier(product, values)) for product in self.recipe.products]
        ready: dict[str, list[tuple[QParams, gs.Variable]]] = {}
        for product, node in found:
            node.name = node_name(product.name)
            for position, grid in enumerate((product.left, product.right)):
                source = node.inputs[position]
                known = ready.setdefault(source.name, [])
                shared = next((value for other, value in known if grid.same_as(other)), None)
                if shared is None:
                    prefix = f"{product.name}.{'right' if position else 'left'}"
                    shared = quantize_dequantize(graph, source, grid, self.target, prefix)
                    known.append((grid, shared))
                node.inputs[position] = shared
        return Changes(tuple(product.path for product in self.recipe.products))

    def ensures(self, graph: gs.Graph) -> None:
        for product, node in product_nodes(graph, self.recipe):
            if not all(is_dequantized(factor) for factor in node.inputs):
                raise PostconditionError(f"{product.path}: not both of its factors are quantized")


def product_nodes(graph: gs.Graph, recipe: QuantRecipe) -> list[tuple[ProductRecipe, gs.Node]]:
    """Each product with the node that ``QuantizeAttention`` named after it.

    Raises:
        PostconditionError: one is gone.
    """
    nodes = {node.name: node for node in graph.nodes}
    for product in recipe.products:
        if node_name(product.name) not in nodes:
            raise PostconditionError(f"{product.path}: its node {node_name(product.name)} is gone")
    return [(product, nodes[node_name(product.name)]) for product in recipe.products]


def _multiplier(product: ProductRecipe, values: Mapping[str, gs.Tensor]) -> gs.Node:
    value = values.get(product.name)
    if value is None or not value.inputs:
        raise PreconditionError(f"{product.path}: no value {product.name} in the graph; run LowerAttention first")
    node = value.inputs[0]
    if node.op != "MatMul":
        raise PreconditionError(f"{product.path}: {product.name} is computed by {node.op}, not by MatMul")
    return node
