"""Move the factors of scaled inputs into the nodes that compute those inputs, where these are linear.

    Q(f * norm(x; gamma, beta))  ==  Q(norm(x; f gamma, f beta))        and so for layers, attention values, products

``RescaleInputs`` puts one Mul in front of every scaled layer: one more sweep over an activation. Behind the affine
of a normalization, behind the values of an attention or the linear half of a gated unit it is for free. Everywhere
else it stays, and the report says what is in the way.

A layer that takes a factor keeps its integers; its scales and its bias are multiplied. Its result is then another
number than the recipe's, and is called ``<layer>.scaled``: no value of the recipe's name has another meaning.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import read_instead
from tfmq_export.passes.reading import float_values, rank_of
from tfmq_export.passes.scaling.absorb_factor import absorb
from tfmq_export.recipe.names import RESCALE, scaled_name


@dataclass(frozen=True)
class FoldRescales(RecipePass):
    """Remove every Mul of ``RescaleInputs`` whose factor constants in front of it can take.

    Runs behind ``QuantizeWeights``, which proves that integers belong to their unscaled weights.
    """

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight is not quantized; run QuantizeWeights first")

    def apply(self, graph: gs.Graph) -> Changes:
        layers = {layer.name for layer in self.recipe.layers}
        changed: list[str] = []
        skipped: list[tuple[str, str]] = []
        for node in [node for node in graph.nodes if node.op == "Mul" and node.name.endswith(RESCALE)]:
            source, factor = node.inputs[0], float_values(node.inputs[1])
            try:
                _refuse_bare_relu(node)
                leading = [1] * (rank_of(source) - factor.ndim)
                found = absorb(graph, source, factor.reshape(*leading, *factor.shape))
            except PreconditionError as reason:
                skipped.append((node.name, str(reason)))
                continue
            found.apply()
            for value in found.values:
                if value.name in layers:
                    value.name = scaled_name(value.name)
            _bypass(node)
            changed.append(node.name)
        return Changes(tuple(changed), tuple(skipped))


def _refuse_bare_relu(node: gs.Node) -> None:
    """Without the Mul a Gemm may stand in front of the Relu; unless it is quantized next, both would run in float."""
    for relu in node.outputs[0].outputs:
        if relu.op == "Relu" and {reader.op for reader in relu.outputs[0].outputs} != {"QuantizeLinear"}:
            raise PreconditionError(f"{relu.name} is not quantized next")


def _bypass(node: gs.Node) -> None:
    """Let the readers of a node read what it reads."""
    (result,) = node.outputs
    read_instead(result, node.inputs[0])
    node.inputs.clear()
