"""A grid per timestep with constant quantizers, against a graph built for each timestep alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import graph_of, infer
from nets.toy_nets import Net, conv_net, token_net, vector_net
from nets.toy_recipes import recipe_for, recipe_with
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Pass, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.lower_timestep_grids import LowerTimestepGrids
from tfmq_export.passes.qdq.offset_inputs import OffsetInputs
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe, TimestepGrids
from tfmq_export.target import Target, find_target

TARGETS = [find_target("openvino"), replace(find_target("tensorrt-rtx"), float_type="float32")]
NETS: list[Callable[[], Net]] = [conv_net, token_net, vector_net]


def varied(layer: LayerRecipe, count: int, seed: int) -> LayerRecipe:
    """The layer with grids per timestep that differ in width and in centre; no output grid."""
    rng = np.random.default_rng(seed)
    scale = (layer.input.scale * rng.uniform(0.4, 1.0, count)).astype(np.float32)
    zero_point = rng.integers(0, layer.input.spec.qmax + 1, count).astype(np.int32)
    widest = int(scale.argmax())
    grid = replace(layer.input, scale=np.asarray(scale[widest]), zero_point=np.asarray(zero_point[widest]))
    return replace(layer, input=grid, output=None, input_by_timestep=TimestepGrids(scale, zero_point))


def varied_recipe(net: Net, activation_bits: int = 8) -> QuantRecipe:
    recipe = recipe_for(net, 8, activation_bits)
    count = len(net.timesteps)
    layers = [varied(layer, count, seed) for seed, layer in enumerate(recipe.layers)]
    by_source = {net.layers[layer.name].source: layer for layer in reversed(layers)}
    # Layers that read one value share its grid, as calibration lays it.
    shared = [by_source[net.layers[layer.name].source] for layer in layers]
    return replace(
        recipe,
        layers=tuple(
            replace(layer, input=other.input, input_by_timestep=other.input_by_timestep)
            for layer, other in zip(layers, shared, strict=True)
        ),
    )


def at_timestep(recipe: QuantRecipe, row: int) -> QuantRecipe:
    """The recipe that has only one timestep's grids, for all timesteps."""

    def single(layer: LayerRecipe) -> LayerRecipe:
        assert layer.input_by_timestep is not None
        grids = layer.input_by_timestep
        grid = QParams(layer.input.spec, np.asarray(grids.scale[row]), np.asarray(grids.zero_point[row]))
        return replace(layer, input=grid, input_by_timestep=None)

    return replace(recipe, layers=tuple(single(layer) for layer in recipe.layers))


def passes(recipe: QuantRecipe, target: Target) -> list[Pass]:
    return [
        FoldConstants(),
        BindRecipe(recipe),
        TabulateTib(recipe.tib, "timestep", "sample"),
        InsertQdq(recipe, target),
        LowerTimestepGrids(recipe, target, "sample"),
        QuantizeWeights(recipe, target),
        OffsetInputs(recipe, target),
    ]


def lowered(net: Net, recipe: QuantRecipe, target: Target) -> gs.Graph:
    graph = graph_of(net.model)
    run_passes(graph, passes(recipe, target))
    return graph


def assert_same_codes(actual: NDArray, expected: NDArray) -> None:
    # A value within float32 rounding of a tie may take the other code: rare, and one step wide.
    wrong = np.abs(actual - expected) > 1e-4 * np.abs(expected).max()
    assert wrong.mean() < 0.02
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("make", NETS)
def test_every_timestep_gets_its_own_grid(make: Callable[[], Net], target: Target, bits: int) -> None:
    net = make()
    recipe = varied_recipe(net, bits)
    together = export_model(lowered(net, recipe, target))

    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        feeds["timestep"] = feeds["timestep"].reshape(-1)
        alone = export_model(lowered(net, at_timestep(recipe, row), TARGETS[0]))
        assert_same_codes(infer(together, feeds)[0], infer(alone, feeds)[0])


def test_each_sample_of_a_batch_may_be_at_its_own_timestep() -> None:
    net = conv_net()
    graph = export_model(lowered(net, varied_recipe(net), TARGETS[0]))
    steps = np.array(net.timesteps.values[:3], np.int64)
    sample = net.feeds(0, batch=3)["sample"]

    (together,) = infer(graph, {"sample": sample, "timestep": steps})

    for index in range(3):
        (alone,) = infer(graph, {"sample": sample[[index]], "timestep": steps[[index]]})
        np.testing.assert_allclose(together[index], alone[0], atol=1e-4 * np.abs(alone).max())


def test_quantizers_are_constant() -> None:
    net = conv_net()
    graph = lowered(net, varied_recipe(net), TARGETS[1])

    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            assert all(isinstance(value, gs.Constant) for value in node.inputs[1:])
            if node.op == "QuantizeLinear":
                assert node.inputs[1].shape == ()


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    net = token_net()
    graph = lowered(net, varied_recipe(net), TARGETS[0])

    assert sum(node.op == "QuantizeLinear" for node in graph.nodes) == 2  # x for three layers, "attended" for one


def test_the_row_of_the_timestep_comes_first() -> None:
    net = conv_net()
    recipe = varied_recipe(net)
    graph = graph_of(net.model)
    run_passes(graph, [FoldConstants(), BindRecipe(recipe)])

    with pytest.raises(PreconditionError, match="run TabulateTib first"):
        run_passes(graph, [LowerTimestepGrids(recipe, TARGETS[0], "sample")])


def test_a_value_with_other_rows_than_samples_is_refused() -> None:
    net = vector_net()
    recipe = varied_recipe(net)
    graph = graph_of(net.model)
    run_passes(graph, passes(recipe, TARGETS[0])[:4])
    graph.tensors()["relu"].shape = ("tokens", 16)

    with pytest.raises(PreconditionError, match="not one per sample"):
        run_passes(graph, [LowerTimestepGrids(recipe, TARGETS[0], "sample")])


def test_several_codes_per_timestep_are_refused() -> None:
    net = conv_net()
    recipe = varied_recipe(net)
    first, *others = recipe.layers
    wide = replace(first.input, spec=replace(first.input.spec, codes=4))
    recipe = replace(recipe, layers=(replace(first, input=wide), *others))

    with pytest.raises(PreconditionError, match="is one code, not 4"):
        lowered(net, recipe, TARGETS[0])


def test_a_second_run_is_refused() -> None:
    net = conv_net()
    recipe = varied_recipe(net)
    graph = lowered(net, recipe, TARGETS[0])

    with pytest.raises(PreconditionError, match="already"):
        run_passes(graph, [LowerTimestepGrids(recipe, TARGETS[0], "sample")])


def test_an_input_left_in_float_is_noticed() -> None:
    net = conv_net()
    recipe = varied_recipe(net)
    graph = graph_of(net.model)
    run_passes(graph, passes(recipe, TARGETS[0])[:4])

    with pytest.raises(PostconditionError, match="not quantized"):
        LowerTimestepGrids(recipe, TARGETS[0], "sample").ensures(graph)


def test_without_grids_per_timestep_nothing_changes() -> None:
    graph = graph_of(conv_net().model)

    (report,) = run_passes(graph, [LowerTimestepGrids(recipe_with(), TARGETS[0], "sample")])

    assert report.changed == ()
