"""The last pass: the graph is valid ONNX, and each layer has the pattern the target fuses."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.graph_file import check_valid
from tfmq_export.passes.qdq.activation_codes import is_dequantized
from tfmq_export.passes.qdq.quantize_attention import product_nodes
from tfmq_export.passes.time.tabulate_tib import computed_from_time
from tfmq_export.recipe.names import node_name
from tfmq_export.target import Target


@dataclass(frozen=True)
class CheckModel(RecipePass):
    """Change nothing; refuse a graph that would load and then quietly run in floating point."""

    target: Target
    timestep: str
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        return Changes()

    def ensures(self, graph: gs.Graph) -> None:
        names = [value.name for node in graph.nodes for value in node.outputs if value.name]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise PostconditionError(f"two nodes compute a value named {twice}")
        nodes = {node.name: node for node in graph.nodes}
        for layer in self.recipe.layers:
            node = nodes.get(node_name(layer.name))
            if node is None:
                raise PostconditionError(f"{layer.path}: its node {node_name(layer.name)} is gone")
            for value in node.inputs if self.target.integer_bias else node.inputs[:2]:
                if not is_dequantized(value):
                    raise PostconditionError(f"{layer.path}: reads {value.name}, which is no integer")
            if not self.target.packed_weights and not isinstance(node.inputs[1].inputs[0].inputs[0], gs.Constant):
                raise PostconditionError(f"{layer.path}: {self.target.name} needs its weight as plain int8")
            if not self.target.integer_bias and any(value.inputs for value in node.inputs[2:]):
                raise PostconditionError(f"{layer.path}: {self.target.name} needs its bias as a float constant")
            readers = node.outputs[0].outputs
            if layer.kind in self.target.quantized_outputs and [reader.op for reader in readers] != ["QuantizeLinear"]:
                raise PostconditionError(f"{layer.path}: {self.target.name} needs QuantizeLinear on its output")
        for product, node in product_nodes(graph, self.recipe):
            turned = self.target.turned_factors
            floats = [factor.name for factor in node.inputs if not is_dequantized(factor, turned=turned)]
            if floats:
                raise PostconditionError(f"{product.path}: reads {floats[0]}, which is no integer")
        strays = computed_from_time(graph, self.timestep)
        if strays:
            raise PostconditionError(f"{strays[0]} still computes from the timestep")
        check_valid(graph)
