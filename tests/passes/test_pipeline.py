from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nets.toy_nets import conv_net, token_net
from nets.toy_recipes import recipe_for, scaled_recipe

from tfmq_export.errors import TargetError
from tfmq_export.passes.finish.half_precision import HalfPrecision
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import QuantRecipe, TimestepGrids
from tfmq_export.target import TARGETS, Target, find_target


def with_grids_per_timestep(recipe: QuantRecipe) -> QuantRecipe:
    first, *others = recipe.layers
    count = len(recipe.tib.timesteps)
    grids = TimestepGrids(np.full(count, first.input.scale, np.float32), np.full(count, first.input.zero_point))
    return replace(recipe, layers=(replace(first, input_by_timestep=grids), *others))


def test_a_grid_per_timestep_under_a_quantized_output_is_refused() -> None:
    recipe = with_grids_per_timestep(recipe_for(conv_net()))

    with pytest.raises(TargetError, match=r"net.conv2d: ort-cpu has no lowering .* set fsc = .tib. in .method."):
        adapt(recipe, find_target("ort-cpu"))
    assert adapt(recipe, find_target("openvino")).layers[0].input_by_timestep is not None


def test_a_recipe_without_the_output_grids_that_a_target_needs_is_refused() -> None:
    recipe = adapt(recipe_for(conv_net()), find_target("openvino"))

    with pytest.raises(TargetError, match="quantize again with --target ort-cpu"):
        adapt(recipe, find_target("ort-cpu"))


def test_output_grids_stay_only_where_kernels_want_them() -> None:
    recipe = recipe_for(conv_net())

    assert all(layer.output is not None for layer in adapt(recipe, find_target("ort-cpu")).layers)
    assert all(layer.output is None for layer in adapt(recipe, find_target("tensorrt")).layers)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_only_half_precision_targets_are_typed_in_fp16(target: Target) -> None:
    recipe = adapt(recipe_for(conv_net()), target)

    kinds = {type(step) for step in passes_for(recipe, target, sample="sample", timestep="timestep")}

    assert (HalfPrecision in kinds) == (target.float_type == "float16")


def names(recipe: QuantRecipe, target: str, **options: Any) -> list[str]:
    passes = passes_for(recipe, find_target(target), sample="sample", timestep="timestep", **options)
    return [type(item).__name__ for item in passes]


def test_a_form_no_layer_can_take_is_refused_before_anything_runs() -> None:
    narrow = scaled_recipe(token_net(), 4, outputs=False)

    with pytest.raises(TargetError, match=r"net.linear: --pts-lowering shift: tensorrt does not fold arithmetic"):
        names(narrow, "tensorrt", pts_lowering="shift")
