"""Finite set calibration, FSC (TFMQ-DM, section 4.2): a grid for each timestep.

The sampler visits T timesteps and no other, so a range need not cover all of them at once. Timesteps are
calibrated independently; a missing one is an error, never the neighbour's grid.
"""

from collections.abc import Sequence

import torch

from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.observers import Observation, activation_grid, merge
from tfmq_export.recipe.grid import QuantSpec


def calibrate_finite_set(
    observations: Sequence[Observation | None], spec: QuantSpec, estimator: str, *, per_timestep: bool
) -> Grid:
    """Grids over what one activation showed.

    Args:
        observations: One per timestep of the schedule.
        per_timestep: False merges them to one grid.
    Raises:
        CalibrationError: a timestep was never seen.
    """
    seen = [observation for observation in observations if observation is not None]
    if not per_timestep:
        return activation_grid(merge(seen), spec, estimator)
    if len(seen) < len(observations):
        missing = observations.index(None)
        raise CalibrationError(f"finite set calibration: timestep {missing} of the schedule was never observed")
    grids = [activation_grid(observation, spec, estimator) for observation in seen]
    return Grid(spec, torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero_point for grid in grids]))
