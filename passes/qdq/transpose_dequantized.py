"""Quantize attention's keys as they are, and transpose them after DequantizeLinear.

    DQ(Q(transpose(k)))  ==  transpose(DQ(Q(k)))            for one scale, no zero point

OpenVINO has kernels that read a transposed second factor, so a Transpose right in front of the product costs nothing.
In front of the quantizer it is one more sweep over the keys, in a layout no kernel reads.

The zero point, which is 0, goes: ONNX Runtime 1.31 moves a DequantizeLinear behind a Transpose and gives one of int8 a
zero point of uint8, which it then refuses to load.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.graph import producer, read_instead, sole_consumer
from tfmq_export.passes.lower.attention import TURN_MATRICES
from tfmq_export.passes.qdq.quantize_attention import product_nodes
from tfmq_export.passes.reading import constant_values, ints_attribute, rank_of


@dataclass(frozen=True)
class TransposeDequantized(RecipePass):
    """Transpose, Q, DQ in front of a product -> Q, DQ, Transpose; runs behind ``QuantizeAttention``."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        changed = []
        for product, node in product_nodes(graph, self.recipe):
            grid = _grid_behind_transpose(graph, node.inputs[1])
            if grid:
                _swap(grid)
                changed.append(product.path)
        return Changes(tuple(changed))

    def ensures(self, graph: gs.Graph) -> None:
        for product, node in product_nodes(graph, self.recipe):
            if _grid_behind_transpose(graph, node.inputs[1]):
                raise PostconditionError(f"{product.path}: its second factor is still turned in front of its quantizer")


def _grid_behind_transpose(graph: gs.Graph, factor: gs.Tensor) -> list[gs.Node]:
    """The Transpose, the quantizer that alone reads it and all up to the DequantizeLinear; empty if it is not so."""
    chain: list[gs.Node] = []
    wanted = ("DequantizeLinear", "Clip", "QuantizeLinear", "Transpose")
    value = factor
    for op in wanted:
        node = producer(value, op)
        if node is None and op == "Clip":
            continue
        if node is None or (chain and sole_consumer(graph, value, chain[-1].op) is None):
            return []
        chain.append(node)
        value = node.inputs[0]
    *_, quantize, transpose = chain
    _, scale, zero_point = quantize.inputs
    symmetric = rank_of(scale) == 0 and not np.any(constant_values(zero_point))
    return chain[::-1] if symmetric and ints_attribute(transpose, "perm") == TURN_MATRICES else []


def _swap(chain: list[gs.Node]) -> None:
    transpose, *grid = chain
    (keys,), (turned,) = transpose.inputs, transpose.outputs
    (dequantized,) = grid[-1].outputs
    read_instead(dequantized, turned)
    grid[0].inputs[0] = keys
    transpose.inputs = [dequantized]
    grid[-1].inputs = grid[-1].inputs[:2]
    for node in grid:
        node.outputs[0].shape = keys.shape
