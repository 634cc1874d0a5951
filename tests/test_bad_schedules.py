"""A noise schedule that cannot be walked is refused, whatever its configuration holds."""

import math
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from standins.anything import PLAIN, QUICKLY, only_ours

from tfmq_export.errors import ConfigError
from tfmq_export.models.schedulers import choose_scheduler, scheduler_config
from tfmq_export.runtime.sampler import DdimSchedule

DDIM = scheduler_config(DDIMScheduler())
SCHEDULERS: dict[str, dict[str, object]] = {
    "no training timesteps": {"num_train_timesteps": 0},
    "training timesteps beyond memory": {"num_train_timesteps": 10**12},
    "training timesteps in words": {"num_train_timesteps": "many"},
    "a beta in words": {"beta_start": "a"},
    "a beta that is no number": {"beta_end": math.nan},
    "betas in words": {"trained_betas": "abc"},
    "betas of lists": {"trained_betas": [[1]]},
    "a schedule that is a list": {"beta_schedule": []},
    "a spacing that is a number": {"timestep_spacing": 3},
}


@pytest.mark.parametrize("changes", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_noise_schedule_that_cannot_be_walked_is_refused_by_both_samplers(changes: dict[str, object]) -> None:
    config = {**DDIM, **changes}

    with pytest.raises(ConfigError):
        DdimSchedule.from_config(config, 10)
    with pytest.raises(ConfigError):
        load_scheduler(config)


def test_a_schedule_beyond_every_float_is_refused_in_numpy() -> None:
    for changes in ({"clip_sample": True, "clip_sample_range": 10**400}, {"clip_sample_range": "wide"}):
        with pytest.raises(ConfigError, match="clip_sample_range"):
            DdimSchedule.from_config({**DDIM, "clip_sample": True, **changes}, 10)


def load_scheduler(config: dict[str, object]) -> object:
    """As a model's loader does, and one walk, where diffusers sees some values first."""
    from tfmq_export.models.walk import DiffusersSampler, require_finite_walk

    sampler = DiffusersSampler(choose_scheduler(config, "own", "model"), 10, {})
    require_finite_walk(sampler)
    return sampler.timesteps


@QUICKLY
@given(changes=st.dictionaries(st.sampled_from(sorted(DDIM)), PLAIN, min_size=1, max_size=3))
def test_any_noise_schedule_is_walked_or_refused(changes: dict[str, object]) -> None:
    config = {**DDIM, **changes}

    for read in (lambda: DdimSchedule.from_config(config, 10), lambda: load_scheduler(config)):
        only_ours(lambda path: read(), Path())  # noqa: B023  # called at once
