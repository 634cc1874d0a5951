from dataclasses import replace

import numpy as np
import pytest
from toy_nets import conv_net, recipe_for

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
