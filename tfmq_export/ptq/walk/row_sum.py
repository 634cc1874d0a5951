"""What a sampler makes of the rows of a call, told by its behaviour.

    e  =  sum over r of w_r e_r          the rows of one image; the weights add up to 1

Classifier-free guidance (Ho and Salimans 2022, equation 6) has the weights 1 - s and s, editing with a picture and a
text (InstructPix2Pix, 2211.09800, equation 3) has three. A pipeline's code does not say which, but what it draws does:
it runs on predictions that are made up, and how far each row's prediction moves the next samples is its weight. Then
it runs on noise, once in every row another, once their weighted sum in all of them: the samples must not tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.ptq.walk.calibration import repeat

IMAGES = 2  # drawn together; fewer do not show how rows are laid out
NUDGE = 0.1  # size of a prediction that shows a weight: samplers that clip answer large ones otherwise
SAME = 2e-3  # of the samples: what is rounding

Predict = Callable[[int, Tensor], Tensor]
"""``predict(call, sample) -> prediction``, both [rows, ...]."""


@dataclass(frozen=True, slots=True)
class RowSum:
    """The prediction that a step is taken with, from the rows of a call.

    Attributes:
        weights: Of each row of an image. The first rows of all images come first, then all second ones.
    """

    weights: tuple[float, ...]

    def __call__(self, prediction: Tensor) -> Tensor:
        """[N, ...] from [rows x N, ...]."""
        parts = prediction.chunk(len(self.weights))
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum(0)


@torch.no_grad()
def row_sum(denoiser: Denoiser, seed: int) -> RowSum | str:
    """How the sampler sums rows, or why that is not known; a few runs without the network.

    Args:
        denoiser: Its sampler draws several images together; predictions are shaped like samples.
    """
    walks = _Walks(denoiser, seed)
    still = walks.along(lambda call, sample: torch.zeros_like(sample))
    if len(still.timesteps) != len(set(still.timesteps)) or len(still.timesteps) != len(denoiser.timesteps):
        return "its sampler does not call the model once for each timestep with all images in one batch"
    if not all(_laid_out(sample) for sample in still.samples):
        return "the rows of a call are not the images once for each part of the guidance"
    rows = len(still.samples[0]) // IMAGES
    if rows == 1:
        return RowSum((1.0,))
    moved = torch.stack([walks.along(_nudge(row)).path - still.path for row in range(rows)])
    found = moved @ moved.sum(0)
    if not found.isfinite().all() or not found.sum():
        return "its samples do not follow its predictions"
    total = RowSum(tuple((found / found.sum()).tolist()))
    apart = walks.along(lambda call, sample: _noise(call, sample)).path
    summed = walks.along(lambda call, sample: total(_noise(call, sample)).repeat(rows, *[1] * (sample.ndim - 1))).path
    if (apart - summed).norm() > SAME * (apart - still.path).norm():
        return "its guidance is no sum of rows that is the same at every timestep"
    return total


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """What a run asked about.

    Attributes:
        timesteps: Of each call.
        samples: Of each call, [rows, ...].
        path: What predictions changed: the samples behind the first call, and the images, flat.
    """

    timesteps: tuple[float, ...]
    samples: tuple[Tensor, ...]
    path: Tensor


class _Walks:
    """Runs of a sampler from the same noise on made-up predictions."""

    def __init__(self, denoiser: Denoiser, seed: int) -> None:
        self._run = denoiser.run_together(IMAGES, seed)

    def along(self, predict: Predict) -> _Walk:
        timesteps: list[float] = []
        samples: list[Tensor] = []

        def told(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
            timesteps.append(float(torch.as_tensor(timestep).reshape(-1)[0]))
            samples.append(sample.detach().clone())
            return predict(len(samples), sample)

        images = repeat(self._run, told)
        followed = [sample[:IMAGES] for sample in samples[1:]]
        return _Walk(
            tuple(timesteps), tuple(samples), torch.cat([value.double().reshape(-1) for value in (*followed, images)])
        )


def _laid_out(sample: Tensor) -> bool:
    """Whether a call has the images in order, as often as an image has rows."""
    return len(sample) % IMAGES == 0 and all(
        torch.equal(sample[start : start + IMAGES], sample[:IMAGES]) for start in range(0, len(sample), IMAGES)
    )


def _nudge(row: int) -> Predict:
    """A small prediction in one row of every image, and 0 in the others."""

    def predict(call: int, sample: Tensor) -> Tensor:
        prediction = torch.zeros_like(sample)
        prediction[row * IMAGES : (row + 1) * IMAGES] = NUDGE * _noise(0, sample[:IMAGES])
        return prediction

    return predict


def _noise(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
