from dataclasses import replace

import numpy as np
import pytest
from toy_nets import conv_net, recipe_for, scaled_recipe, token_net

from tfmq_export.errors import TargetError
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.recipe import QuantRecipe, TimestepGrids
from tfmq_export.target import find_target

TARGET = find_target("ort-cpu")


def with_grids_per_timestep(recipe: QuantRecipe) -> QuantRecipe:
    first, *others = recipe.layers
    count = len(recipe.tib.timesteps)
    grids = TimestepGrids(np.full(count, first.input.scale, np.float32), np.full(count, first.input.zero_point))
    return replace(recipe, layers=(replace(first, input_by_timestep=grids), *others))


def test_a_grid_per_timestep_has_no_lowering_and_is_refused() -> None:
    recipe = recipe_for(conv_net())
    assert passes_for(recipe, TARGET, sample="sample", timestep="timestep")

    with pytest.raises(
        TargetError, match=r"net.conv2d: ort-cpu has no lowering for .*\(1 layers\); set fsc = .tib. in .method."
    ):
        passes_for(with_grids_per_timestep(recipe), TARGET, sample="sample", timestep="timestep")


def names(recipe: QuantRecipe, target: str, **options: str) -> list[str]:
    passes = passes_for(recipe, find_target(target), sample="sample", timestep="timestep", **options)  # type: ignore[arg-type]
    return [type(item).__name__ for item in passes]


def test_layers_are_split_by_exponent_only_where_nothing_else_will_do() -> None:
    narrow, wide = (scaled_recipe(token_net(), bits, outputs=False) for bits in (4, 8))

    assert "SplitExponents" not in names(narrow, "tensorrt")
    assert "SplitExponents" in names(wide, "tensorrt")
    assert "SplitExponents" in names(narrow, "ort-cpu", pts_lowering="split")


def test_a_form_no_layer_can_take_is_refused_before_anything_runs() -> None:
    narrow = scaled_recipe(token_net(), 4, outputs=False)

    with pytest.raises(TargetError, match=r"net.linear: --pts-lowering shift: tensorrt does not fold arithmetic"):
        names(narrow, "tensorrt", pts_lowering="shift")
