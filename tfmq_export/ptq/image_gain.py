"""How much each timestep counts: what an error of the prediction there does to the finished image.

A sampler amplifies errors of its early steps, which decide what is drawn, and shrinks those of its late ones. The gain

    g_t = || image with errors in some steps around t - image ||^2 / sum || error ||^2

is measured on the full-precision model's own trajectory, whatever the sampler and the guidance. The errors are those
of the same module with coarsely rounded weights: they repeat from step to step and have the shapes that
quantization errors have. White noise would not do, because later steps remove it again.

The calibration set then holds as many samples of a timestep as it counts (``calibration.pick_rows``), so grids,
scaling and rounding spend their degrees of freedom where they show.
"""

import copy
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.errors import CalibrationError
from tfmq_export.progress import Step
from tfmq_export.ptq.walk.calibration import CalibrationStep, record
from tfmq_export.ptq.weights import nearest_codes, per_output, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec

WINDOWS = 10
IMAGES = 4
COARSE = QuantSpec(5)  # bits of the disturbed weights: errors about as large as a good 4-bit model's
FLOOR = 0.01  # of the mean gain: no timestep is forgotten


@torch.no_grad()
def image_gain(
    denoiser: Denoiser, *, seed: int, progress: Step, images: int = IMAGES, windows: int = WINDOWS
) -> Tensor:
    """Gain of every timestep, float64 [T]: the geometric mean over the images, between windows log-linear.

    Args:
        images: Trajectories to disturb.
        windows: Runs of neighbouring steps that are disturbed together; each costs the rest of a run.
    Raises:
        CalibrationError: disturbed images are not finite.
    """
    plain = denoiser.module_denoise()
    coarse = replace(denoiser, module=coarsened(denoiser.module)).module_denoise()
    with torch.random.fork_rng(devices=[]):
        runs = denoiser.runs(images, seed)
        recorded = [record(denoiser, plain, [run], _untold, seed) for run in runs]
        calls = min((calls for calls, _ in recorded), key=len)
        edges = np.unique(np.linspace(0, len(calls), windows + 1).round().astype(int))
        logs = []
        for number, (first, stop) in enumerate(pairwise(edges.tolist())):
            each = []
            for run, (made, reference) in zip(runs, recorded, strict=True):
                torch.manual_seed(seed)  # as record did: a sampler may draw noise of its own, the same in every run
                disturbed = _Disturbed(plain, coarse, made, range(first, stop))
                moved = (run(disturbed) - reference).double().square().flatten(1).mean(1)
                each.append(moved / max(disturbed.power, 1e-30))
            logs.append(float(torch.cat(each).clamp_min(1e-30).log().mean()))
            progress(number + 1, len(edges) - 1)
    if not np.isfinite(logs).all():
        raise CalibrationError(
            "errors of 5-bit weights drive the images to NaN or infinity, so no timestep can be weighed by them; set "
            'timestep_weights = "uniform" in [method]'
        )
    middles = (edges[:-1] + edges[1:] - 1) / 2
    gains = torch.from_numpy(np.exp(np.interp(np.arange(len(calls)), middles, logs)))
    visited = np.concatenate([call.inputs[denoiser.timestep].reshape(-1)[:1].numpy() for call in calls])
    rows = torch.from_numpy(denoiser.timesteps.rows(visited))
    total = torch.zeros(len(denoiser.timesteps), dtype=torch.float64).index_add_(0, rows, gains)
    return total / torch.bincount(rows, minlength=len(total)).clamp_min(1)


def _untold(done: int, total: int) -> None:
    """Recording is a small part of the work; the windows tell how far it is."""


def weights_from(gain: Tensor) -> Tensor:
    """Weights of the timesteps from their gains, [T], mean 1."""
    weights = gain / gain.mean()
    weights = weights.clamp_min(FLOOR)
    return weights / weights.mean()


def coarsened(module: nn.Module) -> nn.Module:
    """The same module with every matrix rounded to nearest, a scale per output channel.

    It shares the module's weights and rounds them whenever it reads them: a copy would be as large as the model.
    """
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on copying how arguments are nested
        rough = copy.deepcopy(module, shared)
    for part in list(rough.modules()):
        for name, value in list(part.named_parameters(recurse=False)):
            if value.ndim > 1:
                register_parametrization(part, name, _Coarse(), unsafe=True)
    return rough


class _Coarse(nn.Module):
    """A weight on a coarse grid."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = search_weight_scale(weight, COARSE, candidates=1)
        return nearest_codes(weight, scale, COARSE) * per_output(scale, weight)


class _Disturbed:
    """A denoiser with coarse predictions at some calls; those before are replayed, as nothing differs yet."""

    def __init__(self, plain: Denoise, coarse: Denoise, calls: tuple[CalibrationStep, ...], window: range) -> None:
        self._plain, self._coarse, self._calls, self._window = plain, coarse, calls, window
        self._next = 0
        self.power = 0.0

    def __call__(self, sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        place, self._next = self._next, self._next + 1
        if place < self._window.start:
            return self._calls[place].prediction.clone()
        prediction = self._plain(sample, timestep, **conditioning)
        if place not in self._window:
            return prediction
        disturbed = self._coarse(sample, timestep, **conditioning)
        self.power += float((disturbed - prediction).double().square().mean())
        return disturbed
