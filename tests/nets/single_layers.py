"""One convolution or linear layer, quantized by the passes for ONNX Runtime."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from nets.onnx_graphs import build, graph_of
from nets.toy_nets import node
from nets.toy_recipes import ORT_CPU, recipe_with
from numpy.typing import NDArray

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe


def grid(scale: float, zero_point: int, bits: int = 8) -> QParams:
    return QParams(QuantSpec(bits, signed=False), np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


def quantized(model: onnx.ModelProto, *layers: LayerRecipe) -> gs.Graph:
    recipe = recipe_with(layers)
    graph = graph_of(model)
    run_passes(
        graph, [BindRecipe(recipe), RescaleInputs(recipe), InsertQdq(recipe, ORT_CPU), QuantizeWeights(recipe, ORT_CPU)]
    )
    return graph


def conv_model(
    weight: NDArray, bias: NDArray, size: tuple[int, ...], group: int = 1, **attrs: object
) -> onnx.ModelProto:
    nodes = [node("Conv", "x w b", "conv2d", group=group, **attrs)]
    inputs = {"x": ("n", weight.shape[1] * group, *size)}
    return build(nodes, inputs, {"conv2d": ("n", len(weight), "h", "w")}, {"w": weight, "b": bias})


def codes_of(x: NDArray, params: QParams) -> NDArray[np.int64]:
    codes = np.rint(x / params.scale) + params.zero_point
    return np.clip(codes, params.spec.qmin, params.spec.qmax).astype(np.int64)
