"""Whether the float model is worth comparing with: a proof against garbage cannot see garbage.

Both sides of a comparison start from the same weights. If those are wrong, both draw the same wrong pictures, and every
distance between them is small. So the float model is looked at on its own; what is found is said, not judged.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_export.bundle.pictures import is_picture
from tfmq_export.capture.denoiser import Denoiser, SeededSampler
from tfmq_export.models.walk import DiffusersSampler, without_variance
from tfmq_export.ptq.walk.calibration import CalibrationStep

TRAINED = 0.2
"""Correlation of a prediction with its target: trained models have 0.9 somewhere on the schedule, random ones 0."""
FLAT = 1e-4
"""Of the span of the images: less difference than this between images is none."""
SILENT = (
    "the float model predicts zeros at every step, as one does whose last layer was never trained, so there is nothing "
    "to lose; are these the right weights?"
)
TIMESTEPS = 4  # to put noise on images at
FEW = 4  # images to put it on
SEED = 20


def look_at(denoiser: Denoiser, seed: int, trajectory: tuple[CalibrationStep, ...], images: Tensor) -> list[str]:
    """What looks wrong about a float model, in sentences.

    Args:
        seed: That the images were drawn from.
        trajectory: Its calls while it drew.
        images: What it drew, [N, ...].
    """
    if not any(call.prediction.any() for call in trajectory):
        return [SILENT]
    finite = bool(images.isfinite().all())
    notes = [
        _own_noise(denoiser, denoiser.noise(len(images), seed), trajectory),
        _unvisited(denoiser, trajectory),
        _constant(images) if finite else "",
        _of_another_range(images) if finite else "",
        _untrained(denoiser, images[:FEW]) if finite else "",
    ]
    return [note for note in notes if note]


def _own_noise(denoiser: Denoiser, noise: Tensor, trajectory: tuple[CalibrationStep, ...]) -> str:
    """The first sample should be the noise that was given, at most scaled; guidance puts it there twice."""
    if isinstance(denoiser.sampler, SeededSampler):
        return ""  # it was given a seed, not noise
    first = trajectory[0].inputs[denoiser.sample]
    given = noise.repeat(len(first) // len(noise), *[1] * (noise.ndim - 1))
    if first.shape == given.shape and abs(_correlation(first, given)) < 0.99:
        return (
            "the sampler does not start from the noise it is given, so images drawn by the float model and by the "
            "bundle need not start alike; let it use its second argument"
        )
    return ""


def _unvisited(denoiser: Denoiser, trajectory: tuple[CalibrationStep, ...]) -> str:
    visited = {float(value) for call in trajectory for value in call.inputs[denoiser.timestep].reshape(-1)}
    unseen = [value for value in denoiser.timesteps.values if float(np.float32(value)) not in visited]
    if not unseen:
        return ""
    return (
        f"{len(unseen)} of {len(denoiser.timesteps)} timesteps are never visited by the sampler (first: "
        f"{unseen[0]:g}); nothing was calibrated or proven there; leave them out of Description.timesteps"
    )


def _constant(images: Tensor) -> str:
    span = float(images.max() - images.min())
    if len(images) > 1 and (span == 0 or float(images.std(0).max()) < FLAT * span):
        return "every image is the same, whatever noise it starts from; are these the right weights?"
    return ""


def _of_another_range(images: Tensor) -> str:
    if is_picture(images.shape) and float(images.min()) >= 0 and float(images.max()) <= 1:
        return "the images lie in 0..1, but are compared and drawn as if -1 were black; scale the data to -1..1"
    return ""


@torch.no_grad()
def _untrained(denoiser: Denoiser, images: Tensor) -> str:
    """Noise put on the model's own images should be found again, somewhere on the schedule."""
    sampler = denoiser.sampler
    if not isinstance(sampler, DiffusersSampler):
        return ""  # what a prediction of another sampler means is its own
    best = max((_found_again(denoiser, sampler, images, step) for step in _some(sampler.walk)), default=1.0)
    if best >= TRAINED:
        return ""
    return (
        f"the float model looks untrained: noise put on its own images correlates with what it predicts by {best:.2f} "
        "(a trained one has 0.9); are these the right weights, and is this its scheduler? Where they are untrained on "
        "purpose, ask for less"
    )


def _some(walk: Tensor) -> list[Tensor]:
    return [walk[int(place)] for place in np.linspace(0, len(walk) - 1, TIMESTEPS + 2)[1:-1]]


def _found_again(denoiser: Denoiser, sampler: DiffusersSampler, images: Tensor, step: Tensor) -> float:
    """Correlation of one prediction with its target."""
    scheduler: Any = sampler.fresh()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
    at = step.reshape(1).expand(len(images))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        noisy, target = scheduler.scale_noise(images, at, noise), noise - images
    elif hasattr(scheduler, "add_noise"):
        noisy, kind = scheduler.add_noise(images, noise, at), scheduler.config.get("prediction_type")
        if kind == "v_prediction" and hasattr(scheduler, "get_velocity"):
            target = scheduler.get_velocity(images, noise, at)
        elif kind in ("epsilon", "sample"):
            target = noise if kind == "epsilon" else images
        else:
            return 1.0
    else:
        return 1.0
    scaled = scheduler.scale_model_input(noisy, step) if hasattr(scheduler, "scale_model_input") else noisy
    prediction = denoiser.module_denoise()(scaled, step, **denoiser.prompts(len(images)))
    return _correlation(without_variance(prediction, images, None), target)


def _correlation(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return 1.0
    found = np.corrcoef(first.double().reshape(-1).numpy(), second.double().reshape(-1).numpy())[0, 1]
    return float(np.nan_to_num(found))
