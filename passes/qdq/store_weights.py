"""Store the weights of layers that compute in floating point as integers.

    W  ->  Mul(Cast(codes), scale)      codes INT4 or INT8, one scale per output channel

Engines fold both when they load the graph, so the layer runs as it did, on rounded weights. A DequantizeLinear would
run at every call: ONNX Runtime keeps those, to fuse them with integer kernels.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import is_transposed
from tfmq_export.passes.graph import constant, int4_constant, variable
from tfmq_export.passes.qdq.quantize_weights import FARTHEST
from tfmq_export.passes.reading import float_values
from tfmq_export.passes.scaling.pts_lowering import PACKED_BITS
from tfmq_export.recipe.names import node_name, weight_codes_name
from tfmq_export.recipe.stored_layer import StoredLayer


@dataclass(frozen=True)
class StoreWeights(RecipePass):
    """Give every stored layer of the recipe its integers."""

    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        nodes = {node.name: node for node in graph.nodes}
        for layer in self.recipe.stored:
            node = nodes.get(node_name(layer.name))
            if node is None:
                raise PreconditionError(f"{layer.path}: no node {node_name(layer.name)}; run BindRecipe first")
            if not isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {node.inputs[1].name} is not a constant")
            weight = float_values(node.inputs[1])
            _prove_binding(layer, weight.T if is_transposed(node) else weight)

    def apply(self, graph: gs.Graph) -> Changes:
        nodes = {node.name: node for node in graph.nodes}
        for layer in self.recipe.stored:
            node = nodes[node_name(layer.name)]
            node.inputs[1] = _stored(graph, layer, transposed=is_transposed(node))
        return Changes(tuple(layer.path for layer in self.recipe.stored))


def _prove_binding(layer: StoredLayer, weight: NDArray[np.floating]) -> None:
    """The recipe's integers must be this weight, to ``WEIGHT_REACH`` steps."""
    codes = layer.weight_codes
    if weight.shape != codes.shape:
        raise PreconditionError(
            f"{layer.path}: the graph's weight is {weight.shape}, the recipe's {codes.shape}; made from another model?"
        )
    steps = weight / layer.weight.scale.reshape(-1, *[1] * (codes.ndim - 1))
    if (np.abs(steps.clip(layer.weight.spec.qmin, layer.weight.spec.qmax) - codes) > FARTHEST).any():
        raise PostconditionError(
            f"{layer.path}: the recipe's integers are not a rounding of this weight; made from another model?"
        )


def _stored(graph: gs.Graph, layer: StoredLayer, *, transposed: bool) -> gs.Variable:
    codes, scale = layer.weight_codes, layer.weight.scale.reshape(-1, *[1] * (layer.weight_codes.ndim - 1))
    if transposed:
        codes, scale = codes.T, scale.T
    name, packed = weight_codes_name(layer.name), layer.weight.spec.bits <= PACKED_BITS
    held = int4_constant(name, codes) if packed else constant(name, codes)
    wide = variable(f"{layer.name}.weight_float", dtype=np.float32, shape=codes.shape)
    real = variable(f"{layer.name}.weight_real", dtype=np.float32, shape=codes.shape)
    factor = constant(f"{layer.name}.weight_scale", scale)
    graph.nodes.append(gs.Node("Cast", f"{wide.name}.cast", {"to": TensorProto.FLOAT}, [held], [wide]))
    graph.nodes.append(gs.Node("Mul", f"{real.name}.scale_by", inputs=[wide, factor], outputs=[real]))
    return real
