"""The loop against diffusers' own pipelines and formulas, on a stand-in for a network."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tfmq_export.errors import ConfigError
from tfmq_export.models.schedulers import choose_scheduler, scheduler_config
from tfmq_export.models.walk import DiffusersSampler

NOISE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
TRAINED = scheduler_config(DDPMScheduler())


def predict(sample: Tensor, timestep: Any, /) -> Tensor:
    return torch.tanh(0.8 * sample + float(timestep) / 1000)


def recorded(walked: list[float]) -> Any:
    def denoise(sample: Tensor, timestep: Any, /) -> Tensor:
        walked.append(float(timestep))
        return predict(sample, timestep)

    return denoise


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm++", "unipc", "euler", "euler-a", "heun"])
def test_a_partial_run_walks_the_end_of_the_whole_one(name: str) -> None:
    sampler = DiffusersSampler(choose_scheduler(TRAINED, name, "model"), 10, {})
    walked: list[float] = []

    images = sampler.from_images(recorded(walked), IMAGES, NOISE, {}, strength=0.4)

    assert walked == sampler.walk_from(0.4).tolist() == sampler.walk.tolist()[-len(walked) :]
    assert 4 <= len(walked) < len(sampler.walk)
    assert set(walked) <= set(sampler.timesteps.values)
    assert images.isfinite().all()


def test_a_partial_run_is_that_of_diffusers_img2img() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    expected = scheduler.add_noise(IMAGES, NOISE, torch.tensor([300]))
    for timestep in scheduler.timesteps[6:]:
        expected = scheduler.step(predict(expected, timestep), timestep, expected).prev_sample

    images = DiffusersSampler(DDIMScheduler(), 10, {}).from_images(predict, IMAGES, NOISE, {}, strength=0.4)

    torch.testing.assert_close(images, expected, rtol=0, atol=0)


def test_flow_matching_starts_between_image_and_noise() -> None:
    sampler = DiffusersSampler(FlowMatchEulerDiscreteScheduler(), 4, {})
    seen: list[Tensor] = []

    def denoise(sample: Tensor, timestep: Any, /) -> Tensor:
        seen.append(sample)
        return torch.zeros_like(sample)

    sampler.from_images(denoise, IMAGES, NOISE, {}, strength=0.5)

    sigma = sampler.walk_from(0.5)[0] / 1000
    torch.testing.assert_close(seen[0], (1 - sigma) * IMAGES + sigma * NOISE)


def test_flow_matching_integrates_the_velocity_exactly() -> None:
    """A constant velocity v moves the sample by -v over the whole walk, whatever the steps."""
    velocity = NOISE - IMAGES

    images = DiffusersSampler(FlowMatchEulerDiscreteScheduler(), 5, {})(lambda x, t: velocity, NOISE, {})

    torch.testing.assert_close(images, IMAGES, rtol=0, atol=1e-5)  # five rounded additions


def test_full_strength_forgets_nothing_of_the_walk() -> None:
    sampler = DiffusersSampler(DDIMScheduler(), 10, {})

    assert sampler.walk_from(1.0).tolist() == sampler.walk.tolist()


@pytest.mark.parametrize("strength", [0, -0.1, 1.5, 0.05, float("nan")])
def test_a_strength_that_leaves_no_step_is_refused(strength: float) -> None:
    sampler = DiffusersSampler(DDIMScheduler(), 10, {})

    with pytest.raises(ConfigError, match="leaves none"):
        sampler.walk_from(strength)


def test_a_runge_kutta_warm_up_does_not_start_part_of_the_way() -> None:
    sampler = DiffusersSampler(choose_scheduler(TRAINED, "pndm", "model"), 10, {})

    with pytest.raises(ConfigError, match="use plms"):
        sampler.from_images(predict, IMAGES, NOISE, {}, strength=0.5)


def test_predicted_variances_are_dropped_unless_the_scheduler_reads_them() -> None:
    def with_variance(sample: Tensor, timestep: Any, /) -> Tensor:
        return torch.cat([predict(sample, timestep), torch.full_like(sample, 0.5)], 1)

    plain = DiffusersSampler(DDIMScheduler(), 5, {})
    learned = DiffusersSampler(DDPMScheduler(variance_type="learned_range"), 5, {})

    torch.testing.assert_close(plain(with_variance, NOISE, {}), plain(predict, NOISE, {}), rtol=0, atol=0)
    assert learned(with_variance, NOISE, {}).shape == NOISE.shape
