"""Compute linear layers on inputs of any rank as one Gemm over rows.

    x W + b  ==  Reshape(Gemm(Reshape(x, [-1, in]), W, b), [..., out])

A MatMul and the Add of its bias are two kernels with a grid between them on an engine of integers; Gemm adds the bias
to the sums, in 32 bits. Runs behind ``BindRecipe``; layers that read one value share its rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import computed, constant_values, static_size


@dataclass(frozen=True)
class LinearAsGemm(RecipePass):
    """MatMul, Add -> Reshape, Gemm, Reshape for every linear layer of the recipe."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        rows: dict[str, gs.Variable] = {}
        changed = []
        for layer, node in bound_nodes(graph, self.recipe):
            if node.op == "MatMul":
                _lower(graph, node, layer.name, rows)
                changed.append(layer.path)
        return Changes(tuple(changed))

    def ensures(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if node.op == "MatMul":
                raise PostconditionError(f"{layer.path}: still a MatMul")


def _lower(graph: gs.Graph, node: gs.Node, name: str, rows: dict[str, gs.Variable]) -> None:
    x, weight = node.inputs
    (product,) = node.outputs
    features = static_size(weight, 1)
    if x.name not in rows:
        rows[x.name] = variable(f"{x.name}.rows", np.float32, (None, static_size(weight, 0)))
        target = constant(f"{x.name}.rows_shape", np.array([-1, static_size(weight, 0)], np.int64))
        graph.nodes.append(gs.Node("Reshape", f"{x.name}.to_rows", inputs=[x, target], outputs=[rows[x.name]]))
    bias, result = _bias(node, name)
    node.op, node.attrs = "Gemm", {}
    node.inputs = [rows[x.name], weight, *([] if bias is None else [bias])]
    flat = variable(f"{name}.rows", np.float32, (None, features))
    product.inputs.clear()
    node.outputs = [flat]
    sizes = [-1, -1] if x.shape is None else [size if isinstance(size, int) else -1 for size in x.shape[:-1]]
    if sizes.count(-1) < 2:
        back: gs.Tensor = constant(f"{name}.shape", np.array([*sizes, features], np.int64))
    else:
        back = _shape_of(graph, x, name, features)
    graph.nodes.append(gs.Node("Reshape", f"{name}.from_rows", inputs=[flat, back], outputs=[computed(result)]))


def _bias(node: gs.Node, name: str) -> tuple[gs.Constant | None, gs.Tensor]:
    """The bias that is added behind a MatMul, [out], and the value of both; the Add loses its result."""
    (product,) = node.outputs
    if product.name == name:
        return None, product
    (add,) = product.outputs
    (stored,) = (value for value in add.inputs if value is not product)
    (result,) = add.outputs
    add.outputs.clear()
    return constant(f"{name}.bias", constant_values(stored).reshape(-1)), result


def _shape_of(graph: gs.Graph, x: gs.Tensor, name: str, features: int) -> gs.Variable:
    """The sizes of a result whose input has more than one open size, int64."""
    leading, back = variable(f"{name}.leading", np.int64), variable(f"{name}.shape", np.int64)
    last = constant(f"{name}.features", np.array([features], np.int64))
    graph.nodes += [
        gs.Node("Shape", f"{name}.sizes", {"start": 0, "end": -1}, [x], [leading]),
        gs.Node("Concat", f"{name}.with_features", {"axis": 0}, [leading, last], [back]),
    ]
    return back
