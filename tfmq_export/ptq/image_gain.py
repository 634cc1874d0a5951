"""How much each timestep counts: what an error of the prediction there does to the finished image.

A sampler amplifies errors of its early steps, which decide what is drawn, and shrinks those of its late ones. The gain

    g_t = || image(e_t + d) - image(e_t) ||^2 / || d ||^2        d: small noise on the prediction at timestep t

is measured on the full-precision model's own trajectory, whatever the sampler and the guidance. The calibration
set then holds as many samples of a timestep as it counts (``calibration.pick_rows``), so grids, scaling and rounding
spend their degrees of freedom where they show.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_export.denoiser import Denoise, Denoiser
from tfmq_export.progress import Step
from tfmq_export.ptq.calibration import CalibrationStep, record

PROBES = 10
IMAGES = 4
RELATIVE_NOISE = 0.02  # of the prediction's deviation: about what quantization does
FLOOR = 0.01  # of the mean gain: no timestep is forgotten


@torch.no_grad()
def image_gain(denoiser: Denoiser, *, seed: int, progress: Step, images: int = IMAGES, probes: int = PROBES) -> Tensor:
    """Gain of every timestep, float64 [T]: the geometric mean over the images, between probes log-linear.

    Args:
        images: Trajectories to disturb.
        probes: Steps at which they are; each costs the rest of a run.
    """
    noise, prompts, plain = denoiser.noise(images, seed), denoiser.prompts(images), denoiser.module_denoise()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a sampler may draw noise of its own: the same in every run
        calls, reference = record(denoiser, plain, noise, prompts, lambda done, total: None)
        places = np.unique(np.linspace(0, len(calls) - 1, probes).round().astype(int))
        logs = []
        for number, place in enumerate(places.tolist()):
            torch.manual_seed(seed)
            disturbed = _Disturbed(plain, calls, place, torch.Generator().manual_seed(seed + number))
            moved = (denoiser.sampler(disturbed, noise, prompts) - reference).double().square().flatten(1).mean(1)
            logs.append(float((moved / disturbed.power).clamp_min(1e-30).log().mean()))
            progress(number + 1, len(places))
    gains = torch.from_numpy(np.exp(np.interp(np.arange(len(calls)), places, logs)))
    visited = np.concatenate([call.inputs[denoiser.timestep].reshape(-1)[:1].numpy() for call in calls])
    rows = torch.from_numpy(denoiser.timesteps.rows(visited))
    total = torch.zeros(len(denoiser.timesteps), dtype=torch.float64).index_add_(0, rows, gains)
    return total / torch.bincount(rows, minlength=len(total)).clamp_min(1)


def weights_from(gain: Tensor) -> Tensor:
    """Weights of the timesteps from their gains, [T], mean 1."""
    weights = gain / gain.mean()
    weights = weights.clamp_min(FLOOR)
    return weights / weights.mean()


class _Disturbed:
    """A denoiser with noise on one of its predictions; those before it are replayed, as nothing differs yet."""

    def __init__(
        self, plain: Denoise, calls: tuple[CalibrationStep, ...], place: int, generator: torch.Generator
    ) -> None:
        self._plain, self._calls, self._place, self._generator = plain, calls, place, generator
        self._next = 0
        self.power = 0.0

    def __call__(self, sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        place, self._next = self._next, self._next + 1
        if place < self._place:
            return self._calls[place].prediction.clone()
        prediction = self._plain(sample, timestep, **conditioning)
        if place > self._place:
            return prediction
        noise = torch.randn(prediction.shape, generator=self._generator).to(prediction)
        axes = tuple(range(1, noise.ndim))
        deviation = RELATIVE_NOISE * prediction.std()
        self.power = float(deviation.double().square())
        return prediction + noise / noise.square().mean(axes, keepdim=True).sqrt() * deviation
