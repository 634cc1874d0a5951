"""Scale the inputs of layers, and their weights the other way: equivalent and power-of-two scaling.

    layer(x, W)  ==  layer(x f, W / f)        f = 1 / (tau 2^d) > 0, one per input channel

The Mul in front of a layer is what its activation grid sees. ``FoldRescales`` moves it on into what computes
``x``, where that is linear; layers that read one value times one factor share the node.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes, is_transposed
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import Computed, float_values
from tfmq_export.recipe.names import RESCALE
from tfmq_export.recipe.recipe import LayerRecipe


@dataclass(frozen=True)
class RescaleInputs(RecipePass):
    """Put ``Mul(1 / (tau 2^d))`` in front of every scaled layer, and ``tau 2^d`` into its float weight."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            if layer.input_factor is None:
                continue
            if not isinstance(node.inputs[1], gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {node.inputs[1].name} is not a constant")
            if any(name.endswith(RESCALE) for name in _last_nodes(node.inputs[0])):
                raise PreconditionError(f"{layer.path}: its input is scaled already")

    def apply(self, graph: gs.Graph) -> Changes:
        inserted: dict[str, list[tuple[NDArray[np.float32], gs.Tensor]]] = {}
        changed = []
        for layer, node in bound_nodes(graph, self.recipe):
            factor = layer.input_factor
            if factor is None:
                continue
            if layer.kind == "conv":  # channels on axis 1
                factor = factor.reshape(-1, *[1] * (layer.weight_codes.ndim - 2))
            source = node.inputs[0]
            ready = inserted.setdefault(source.name, [])
            scaled = next((value for other, value in ready if np.array_equal(other, factor)), None)
            if scaled is None:
                prefix = source.name if not ready else f"{source.name}.{len(ready)}"
                scaled = _rescale(graph, source, factor, prefix)
                ready.append((factor, scaled))
            node.inputs[0] = scaled
            _scale_weight(layer, node)
            changed.append(layer.path)
        return Changes(tuple(changed))


def scale_input_channels(
    weight: NDArray[np.floating], factor: NDArray[np.floating], groups: int
) -> NDArray[np.floating]:
    """Every input channel of a weight times its factor.

    Args:
        weight: [out, in / groups, ...].
        factor: [in].
    """
    rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    scaled: NDArray[np.floating] = rows * factor.reshape(groups, 1, -1, 1)
    return scaled.reshape(weight.shape)


def _rescale(graph: gs.Graph, source: gs.Tensor, factor: NDArray[np.float32], prefix: str) -> gs.Tensor:
    # max(x, 0) f == max(x f, 0) for f > 0. A Relu that no QuantizeLinear follows would be fused with the Gemm in
    # front of it to one that ONNX Runtime runs in floating point.
    behind_relu = bool(source.inputs) and source.inputs[0].op == "Relu"
    plain = source.inputs[0].inputs[0] if behind_relu else source
    scaled = variable(f"{prefix}.rescaled", dtype=np.float32, shape=source.shape)
    inputs = [plain, constant(f"{prefix}.factor", factor)]
    graph.nodes.append(gs.Node("Mul", f"{prefix}{RESCALE}", inputs=inputs, outputs=[scaled]))
    if not behind_relu:
        return scaled
    positive = variable(f"{prefix}.rescaled_relu", dtype=np.float32, shape=source.shape)
    graph.nodes.append(gs.Node("Relu", f"{prefix}.relu", inputs=[scaled], outputs=[positive]))
    return positive


def _last_nodes(value: gs.Tensor) -> list[str]:
    """Names of the node that computes a value, and of the one before it where it is a Relu."""
    names = [node.name for node in value.inputs]
    return names + [node.name for relu in value.inputs if relu.op == "Relu" for node in relu.inputs[0].inputs]


def _scale_weight(layer: LayerRecipe, node: gs.Node) -> None:
    """``tau 2^d W``; shapes that do not fit are left to ``QuantizeWeights``, which names them."""
    transposed = is_transposed(node)
    values = float_values(node.inputs[1]).T if transposed else float_values(node.inputs[1])
    if values.shape != layer.weight_codes.shape:
        return

    def scaled() -> NDArray[np.float32]:
        found = scale_input_channels(values, layer.weight_factor, layer.groups).astype(np.float32)
        return found.T if transposed else found

    # Computed when it is read, one layer at a time: all scaled weights together are as large as the model.
    lazy = Computed(values.T if transposed else values, scaled)
    node.inputs[1] = gs.Constant(f"{layer.name}.weight_rescaled", lazy)
