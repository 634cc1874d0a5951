from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import graph_of, infer, normal
from nets.toy_nets import Net, conv_net
from nets.toy_recipes import recipe_for

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.time.correct_prediction import CorrectPrediction
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.recipe import QuantRecipe


def corrected_recipe(net: Net) -> QuantRecipe:
    channels = net.feeds(net.timesteps.values[0])["sample"].shape[1]
    rows = normal(4, len(net.timesteps), 3, channels)
    return replace(recipe_for(net), correction=Correction(rows, frozenset({"conv"})))


def graphs_of(net: Net, recipe: QuantRecipe) -> tuple[gs.Graph, gs.Graph]:
    plain, changed = graph_of(net.model), graph_of(net.model)
    run_passes(plain, [TabulateTib(recipe.tib, "timestep", "sample")])
    run_passes(changed, [TabulateTib(recipe.tib, "timestep", "sample"), CorrectPrediction(recipe, "sample")])
    return plain, changed


def test_each_sample_is_corrected_by_the_row_of_its_own_timestep() -> None:
    net = conv_net()
    recipe = corrected_recipe(net)
    plain, changed = graphs_of(net, recipe)
    order = [2, 0, 1]
    values = net.timesteps.array[order]
    feeds = net.feeds(0, batch=3) | {"timestep": values}

    (before,) = infer(export_model(plain), feeds)
    (after,) = infer(export_model(changed), feeds)

    assert recipe.correction is not None
    gain, share, offset = (recipe.correction.rows[order, part][:, :, None, None] for part in range(3))
    np.testing.assert_allclose(after, gain * before + share * feeds["sample"] + offset, rtol=1e-5, atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_a_graph_that_looks_no_timestep_up_is_refused() -> None:
    net = conv_net()

    with pytest.raises(PreconditionError, match=r"closed_loop = false"):
        run_passes(graph_of(net.model), [CorrectPrediction(corrected_recipe(net), "sample")])
