"""A bundle draws in numpy as its scheduler does in diffusers, whichever it is, as long as it only weighs and adds."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from nets.tiny_model import tiny_folder
from standins.commands import run
from torch import Tensor

from tfmq_export import load, open_bundle
from tfmq_export.bundle.linear_walk import FILE, LinearWalk
from tfmq_export.errors import LoadError
from tfmq_export.gate.golden import make_golden
from tfmq_export.models.linear_walk import linear_walk
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.runtime.sampler import sample, schedule_of

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("EDMEulerScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False}),
]
OTHERS = [
    ("DDIMScheduler", {}),  # clips the predicted image
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
]


def sampler_of(name: str, options: dict[str, Any], steps: int = 9) -> DiffusersSampler:
    return DiffusersSampler(getattr(diffusers, name)(**options), steps, {})


def predict(sample: Tensor, timestep: Any) -> Tensor:
    """Something that depends on both, and is not linear."""
    return torch.tanh(sample.flip(-1)) + 0.1 * torch.cos(torch.as_tensor(timestep, dtype=torch.float32))


@pytest.mark.parametrize(("name", "options"), LINEAR)
def test_numpy_draws_what_diffusers_draws(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    sampler = sampler_of(name, options)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = sampler(predict, noise, {}).numpy()
    walk = linear_walk(sampler)
    assert walk is not None
    walk.save(tmp_path / "walk.npz")
    asked: list[float] = []

    def denoise(x: np.ndarray, timestep: float) -> np.ndarray:
        asked.append(timestep)
        return predict(torch.from_numpy(x), timestep).numpy()

    drawn = sample(denoise, noise.numpy(), walk)

    np.testing.assert_allclose(drawn, wanted, atol=2e-4 * np.abs(wanted).max())
    assert asked == pytest.approx(sampler.walk.tolist())
    assert isinstance(asked[0], int) != sampler.walk.dtype.is_floating_point


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_what_clips_or_draws_noise_has_no_weights(name: str, options: dict[str, Any]) -> None:
    assert linear_walk(sampler_of(name, options)) is None


@pytest.mark.parametrize(
    ("timesteps", "weights"),
    [
        (np.arange(3), np.eye(3)),
        (np.arange(3), np.ones((4, 4))),  # of predictions still to come
        (np.arange(3), np.full((4, 4), np.nan)),
        (np.arange(0), np.eye(1)),
        (np.zeros((3, 1)), np.eye(4)),
    ],
)
def test_weights_that_are_none_are_refused(timesteps: np.ndarray, weights: np.ndarray) -> None:
    with pytest.raises(LoadError, match="calls"):
        LinearWalk(timesteps, weights)


def test_a_bundle_brings_its_walk_and_is_gated_by_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--preset", "fp32", "--scheduler", "dpm++", "--steps", "4", "--validation-images", "1", "-q"]
    made = run("export", tiny_folder(tmp_path / "unet"), "-o", out, *options, "--min-psnr", "-100")
    assert made.exit_code == 0, made.output
    bundle = open_bundle(out)

    schedule = schedule_of(bundle)
    golden = make_golden(bundle, samples=2)
    with load(out) as denoiser:
        drawn = sample(denoiser, np.zeros((1, 3, 16, 16), np.float32), schedule)  # type: ignore[arg-type]

    assert isinstance(schedule, LinearWalk)
    assert FILE in bundle.manifest.files
    assert len(golden.images) == 2
    assert np.isfinite(drawn).all()
    (out / FILE).write_bytes(b"not this")
    with pytest.raises(LoadError, match=r"walk\.npz"):
        schedule_of(bundle)
