"""Biases as integer kernels add them: int32 codes on the accumulator's grid, ``input scale * weight step``."""

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.graph import constant, variable
from tfmq_export.recipe.recipe import LayerRecipe


def accumulator_step(layer: LayerRecipe) -> NDArray[np.float32]:
    """What one step of a layer's sums is worth, [out]: exactly the float32 product, which ONNX Runtime insists on."""
    return (layer.input.scale * layer.weight_step).astype(np.float32)


def store_bias(graph: gs.Graph, layer: LayerRecipe, codes: NDArray[np.generic], prefix: str) -> gs.Variable:
    """Dequantize integer codes, one per output channel or several sets of them behind each other.

    Args:
        codes: Whole numbers of any type, [out] or [sets, out].
    Raises:
        PreconditionError: they do not fit 32 bits.
    """
    if np.abs(codes).max(initial=0) > np.iinfo(np.int32).max:
        raise PreconditionError(
            f"{layer.path}: its bias does not fit 32 bits in steps of input and weight; some of its output channels "
            f'have next to no weight beside it: set these weights to 0, or keep the layer with [layers."{layer.path}"] '
            'weights = "float"'
        )
    stored = codes.reshape(-1).astype(np.int32)
    scale = np.tile(accumulator_step(layer), stored.size // len(layer.weight_codes))
    inputs = [
        constant(f"{prefix}_codes", stored),
        constant(f"{prefix}_scale", scale),
        constant(f"{prefix}_zero_point", np.zeros(stored.size, np.int32)),
    ]
    real = variable(f"{prefix}_dequantized", np.float32, stored.shape)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{prefix}_dq", {"axis": 0}, inputs, [real]))
    return real
