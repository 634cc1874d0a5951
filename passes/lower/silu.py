"""Compute SiLU with one hyperbolic tangent.

    x sigmoid(x)  ==  h + h tanh(h)    with h = x / 2

OpenVINO's sigmoid is an exponential and a division, its tanh a table of polynomials: SiLU between a norm and a
quantizer takes 0.65 of the time. The norm takes the half in its affine, where a power of two rounds nothing. Far below
zero the sum cancels: what is left is right to a rounding of ``h``, and lies below any step of a grid.

Runs behind ``FoldRescales``, which knows SiLU by its sigmoid and looks for affines.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, read_instead, sole_consumer, variable
from tfmq_export.passes.reading import rank_of
from tfmq_export.passes.scaling.absorb_factor import absorb

NORMS = frozenset({"GroupNormalization", "LayerNormalization", "BatchNormalization", "InstanceNormalization"})


@dataclass(frozen=True)
class LowerSilu(Pass):
    """Sigmoid, Mul -> Mul by one half, Tanh, Mul, Add."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        found = _silus(graph)
        for sigmoid, product in found:
            _lower(graph, sigmoid, product)
        return Changes(tuple(product.name for _, product in found))

    def ensures(self, graph: gs.Graph) -> None:
        left = [product.name for _, product in _silus(graph)]
        if left:
            raise PostconditionError(f"{left[0]}: still a SiLU")


def _silus(graph: gs.Graph) -> list[tuple[gs.Node, gs.Node]]:
    """Each Sigmoid with the Mul that alone reads it, beside the Sigmoid's own input."""
    found = []
    for node in graph.nodes:
        if node.op != "Sigmoid" or node.outputs[0].dtype != np.float32:
            continue
        product = sole_consumer(graph, node.outputs[0], "Mul")
        if product is not None and any(value is node.inputs[0] for value in product.inputs):
            found.append((node, product))
    return found


def _lower(graph: gs.Graph, sigmoid: gs.Node, product: gs.Node) -> None:
    (x,), (y,) = sigmoid.inputs, product.outputs
    for node in (sigmoid, product):
        node.inputs.clear()
        node.outputs.clear()
    half, turn, turned = (variable(f"{y.name}_{part}", np.float32, x.shape) for part in ("half", "tanh", "turned"))
    one_half = constant(f"{y.name}_one_half", np.array(0.5, np.float32))
    graph.nodes += [
        gs.Node("Mul", half.name, inputs=[x, one_half], outputs=[half]),
        gs.Node("Tanh", turn.name, inputs=[half], outputs=[turn]),
        gs.Node("Mul", turned.name, inputs=[half, turn], outputs=[turned]),
        gs.Node("Add", product.name, inputs=[half, turned], outputs=[y]),
    ]
    _halve_affine(graph, x, half)


def _halve_affine(graph: gs.Graph, x: gs.Tensor, half: gs.Variable) -> None:
    """Let a normalization that nothing else reads return the half itself."""
    if not x.inputs or x.inputs[0].op not in NORMS:
        return
    try:
        found = absorb(graph, x, np.full([1] * rank_of(x), 0.5, np.float32))
    except PreconditionError:
        return  # the Mul stays
    found.apply()
    read_instead(half, x)
    half.inputs.clear()
