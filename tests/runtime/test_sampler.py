from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tfmq_export.errors import ConfigError
from tfmq_export.runtime.sampler import DdimSchedule, guided, sample

EMOJI_COND = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0034,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
EMOJI = {**EMOJI_COND, "beta_schedule": "linear", "beta_start": 0.0001}
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}
TRAINED = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 50,
    "trained_betas": np.geomspace(1e-4, 0.3, 50).tolist(),
    "prediction_type": "sample",
    "clip_sample_range": 0.7,
}

NOISE = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)


def predict(x: np.ndarray, timestep: int) -> np.ndarray:
    """A smooth stand-in for a network; it reads both of its inputs."""
    return np.tanh(0.8 * x + np.float32(timestep / 1000)).astype(np.float32)


def diffusers_images(config: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray]:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    current = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        prediction = torch.from_numpy(predict(current.numpy(), int(timestep)))
        current = scheduler.step(prediction, timestep, current).prev_sample
    return scheduler.timesteps.numpy(), current.numpy()


def assert_same_images(config: dict[str, Any], steps: int) -> None:
    timesteps, images = diffusers_images(config, steps)

    schedule = DdimSchedule.from_config(config, steps)

    np.testing.assert_array_equal(schedule.timesteps, timesteps)
    # Unclipped images of an untrained predictor reach magnitudes of hundreds, hence the relative part.
    np.testing.assert_allclose(sample(predict, NOISE, schedule), images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [EMOJI, EMOJI_COND, STABLE_DIFFUSION, ZERO_SNR, TRAINED, {}])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_the_loop_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    assert_same_images(config, steps)


@settings(max_examples=40, deadline=None)
@given(
    config=st.fixed_dictionaries(
        {
            "num_train_timesteps": st.sampled_from([100, 999, 1000]),
            "beta_start": st.floats(1e-4, 1e-3),
            "beta_end": st.floats(5e-3, 2e-2),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
            "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
            "set_alpha_to_one": st.booleans(),
            "clip_sample": st.just(True),
            "clip_sample_range": st.floats(0.5, 2.0),
        }
    ),
    steps=st.integers(1, 25),
)
def test_the_loop_is_that_of_diffusers_for_any_options(config: dict[str, Any], steps: int) -> None:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assume(scheduler.timesteps.min() >= 0)  # Rounding can carry its trailing timesteps one too far, to -1.

    assert_same_images(config, steps)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thresholding": True}, "thresholding is not supported"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ({"steps_offset": 990}, "reach timestep 1890"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "timestep 999 is pure noise"),
    ],
)
def test_a_schedule_ddim_cannot_walk_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DdimSchedule.from_config({**EMOJI, **change}, 10)


def test_trailing_timesteps_end_inside_the_schedule() -> None:
    config = {"num_train_timesteps": 999, "timestep_spacing": "trailing"}

    timesteps = DdimSchedule.from_config(config, 23).timesteps

    assert len(timesteps) == 23
    assert timesteps.min() >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.1000"):
        DdimSchedule.from_config(EMOJI, steps)


def test_progress_counts_every_step() -> None:
    seen: list[tuple[int, int]] = []

    sample(predict, NOISE, DdimSchedule.from_config(EMOJI, 3), progress=lambda done, total: seen.append((done, total)))

    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_prediction_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[1, 3, 6, 6\] for a sample of \[2, 3, 6, 6\]"):
        sample(lambda x, _: x[:1], NOISE, DdimSchedule.from_config(EMOJI, 3))


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.4), (7, 0.5), (10, 1.0)])
def test_a_partial_walk_is_that_of_diffusers(steps: int, strength: float) -> None:
    images = np.random.default_rng(1).uniform(-1, 1, NOISE.shape).astype(np.float32)
    scheduler = DDIMScheduler.from_config(EMOJI_COND)
    scheduler.set_timesteps(steps)
    walked = scheduler.timesteps[steps - int(steps * strength) :]
    current = scheduler.add_noise(torch.from_numpy(images), torch.from_numpy(NOISE), walked[:1])
    start = current.numpy()
    for timestep in walked:
        prediction = torch.from_numpy(predict(current.numpy(), int(timestep)))
        current = scheduler.step(prediction, timestep, current).prev_sample

    schedule = DdimSchedule.from_config(EMOJI_COND, steps).last(strength)

    np.testing.assert_array_equal(schedule.timesteps, walked.numpy())
    np.testing.assert_allclose(schedule.noised(images, NOISE), start, rtol=1e-5, atol=1e-6)
    drawn = sample(predict, schedule.noised(images, NOISE), schedule)
    np.testing.assert_allclose(drawn, current.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0, 0.05, 1.01, float("nan")])
def test_a_partial_walk_of_no_step_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match="leaves none"):
        DdimSchedule.from_config(EMOJI, 10).last(strength)


def test_predicted_variances_are_dropped() -> None:
    schedule = DdimSchedule.from_config(EMOJI, 5)

    def with_variance(x: np.ndarray, timestep: int) -> np.ndarray:
        return np.concatenate([predict(x, timestep), np.full_like(x, 0.5)], 1)

    np.testing.assert_array_equal(sample(with_variance, NOISE, schedule), sample(predict, NOISE, schedule))


LABELS = np.asarray([[1.0], [2.0]], np.float32)
NULL = np.asarray([0.25], np.float32)


def labelled(x: np.ndarray, timestep: int, label: np.ndarray) -> np.ndarray:
    assert len(x) == len(label)
    return x * label[:, :, None, None] + np.float32(timestep)


def test_guidance_in_one_batch_equals_two_runs() -> None:
    denoise = guided(labelled, {"label": LABELS}, {"label": NULL}, 3.0)

    null = labelled(NOISE, 5, np.stack([NULL, NULL]))
    expected = null + 3.0 * (labelled(NOISE, 5, LABELS) - null)
    np.testing.assert_allclose(denoise(NOISE, 5), expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_runs_the_conditional_half_only() -> None:
    batches: list[int] = []

    def counting(x: np.ndarray, timestep: int, label: np.ndarray) -> np.ndarray:
        batches.append(len(x))
        return labelled(x, timestep, label)

    prediction = guided(counting, {"label": LABELS}, {}, 1.0)(NOISE, 5)

    np.testing.assert_array_equal(prediction, labelled(NOISE, 5, LABELS))
    assert batches == [2]


def test_guidance_needs_a_fitting_unconditional_value() -> None:
    with pytest.raises(ConfigError, match="no unconditional value for label"):
        guided(labelled, {"label": LABELS}, {}, 2.0)
    with pytest.raises(ConfigError, match=r"unconditional shape \[2, 1\], needs \[1\]"):
        guided(labelled, {"label": LABELS}, {"label": LABELS}, 2.0)
