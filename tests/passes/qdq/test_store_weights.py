"""Weights that are stored as integers and computed with in floating point."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from nets.onnx_graphs import graph_of, infer
from nets.toy_nets import Net, conv_net, token_net
from nets.toy_recipes import recipe_with, stored_recipe_for
from onnx import TensorProto

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.store_weights import StoreWeights
from tfmq_export.recipe.recipe import QuantRecipe


def stored(net: Net, recipe: QuantRecipe) -> onnx.ModelProto:
    graph = graph_of(net.model)
    run_passes(graph, [FoldConstants(), BindRecipe(recipe), StoreWeights(recipe)])
    return export_model(graph)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [conv_net, token_net])
def test_the_graph_computes_with_the_integers_real_values(make: type, bits: int) -> None:
    net = make()
    recipe = stored_recipe_for(net, bits)
    plain = graph_of(net.model)
    run_passes(plain, [FoldConstants(), BindRecipe(recipe)])
    for layer in recipe.stored:
        (node,) = [node for node in plain.nodes if node.name == f"node_{layer.name}"]
        node.inputs[1].values = layer.real.T if node.op == "MatMul" else layer.real

    made = stored(net, recipe)

    feeds = net.feeds(net.timesteps.values[0], seed=0)
    (expected,), (actual,) = infer(export_model(plain), feeds), infer(made, feeds)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    held = {item.name: item.data_type for item in made.graph.initializer}
    wanted = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    assert all(held[f"{layer.name}.weight_codes"] == wanted for layer in recipe.stored)


def test_integers_of_another_model_are_refused() -> None:
    net = conv_net()
    recipe = stored_recipe_for(net, 4)
    first, *rest = recipe.stored
    other = replace(first, weight_codes=np.flip(first.weight_codes, 0).copy())

    with pytest.raises(PostconditionError, match="not a rounding of this weight"):
        stored(net, replace(recipe, stored=(other, *rest)))


def test_a_layer_that_is_not_bound_is_refused() -> None:
    recipe = stored_recipe_for(conv_net(), 4)
    graph = graph_of(conv_net().model)
    for node in graph.nodes:
        node.name = ""

    with pytest.raises(PreconditionError, match="run BindRecipe first"):
        run_passes(graph, [StoreWeights(replace(recipe_with(), stored=recipe.stored))])
