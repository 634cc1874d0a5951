"""What a linear scheduler of diffusers weighs its predictions with, read off its own code in one run.

The sample it is run on is not a picture but a list of numbers, one for the starting noise and one for each prediction:
noise is the first unit vector, prediction j the one behind. A scheduler that only weighs and adds carries the weights
along, and they can be read from every sample on the way. A second run, on random numbers of any size, tells whether it
was one.
"""

import numpy as np
import torch
from torch import Tensor

from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.models.walk import DiffusersSampler

LARGE = 3.0  # of the random numbers: what clips predicted images does so with these
CLOSE = 1e-3  # relative; schedulers compute in float32


def linear_walk(sampler: DiffusersSampler) -> LinearWalk | None:
    """The weights of a sampler's scheduler; None where it is not linear, or draws noise on the way."""
    timesteps = sampler.walk
    calls = len(timesteps)
    units = torch.eye(calls + 1)[:, None, :, None]  # [numbers, 1, numbers, 1]: as a batch of pictures
    samples = _run(sampler, units[0][None], units[1:])
    weights = torch.stack([sample.reshape(-1) for sample in samples]).double().numpy()
    if not np.isfinite(weights).all() or np.abs(np.triu(weights, 1)).max() > 0:
        return None
    whole = not timesteps.dtype.is_floating_point
    walk = LinearWalk(timesteps.numpy().astype(np.int64 if whole else np.float64), weights)
    return walk if _is_linear(sampler, walk) else None


def _is_linear(sampler: DiffusersSampler, walk: LinearWalk) -> bool:
    generator = torch.Generator().manual_seed(0)
    calls = len(walk.timesteps)
    noise, *predictions = LARGE * torch.randn(calls + 1, 1, 1, 8, 8, generator=generator)
    samples = _run(sampler, noise, torch.stack(predictions))
    seen = [value.numpy() for value in (noise, *predictions)]
    for call, sample in enumerate(samples):
        found, wanted = walk.mixed(call, seen[: call + 1]), sample.numpy()
        if not np.allclose(found, wanted, rtol=CLOSE, atol=CLOSE * float(np.abs(wanted).max())):
            return False
    return True


@torch.no_grad()
def _run(sampler: DiffusersSampler, noise: Tensor, predictions: Tensor) -> list[Tensor]:
    """The sample that each call gets, and the image at the end.

    Args:
        predictions: Of each call, [S, ...], whatever the sample is.
    """
    samples: list[Tensor] = []

    def denoise(sample: Tensor, timestep: object, /, **conditioning: Tensor) -> Tensor:
        samples.append(sample.clone())
        return predictions[len(samples) - 1].reshape(sample.shape).clone()

    image = DiffusersSampler(sampler.scheduler, sampler.steps, {})(denoise, noise, {})
    return [*samples, image]
