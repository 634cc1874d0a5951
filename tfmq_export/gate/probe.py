"""The fixed questions a bundle is asked: one batch at every timestep, and images from one noise.

At timestep t the sample is ``signal_t * picture + noise_t * noise``, as on a sampling trajectory, where the bundle
samples with DDIM; with any other scheduler it is noise. Pictures, noise and conditioning are the same on every machine.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pictures import is_picture
from tfmq_export.runtime.draw import drawn, stored_prompts
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.compare import as_pictures
from tfmq_export.runtime.sampler import DdimSchedule, schedule_of

COARSE = 8
"""Pixels a side of a picture's squares."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Inputs of a bundle.

    Attributes:
        noise: [N, ...].
        picture: [N, ...], in -1..1.
        levels: Share of picture and of noise at each timestep, [T, 2].
        conditioning: [N, ...] by name.
        schedule: How images are drawn; None where the bundle's scheduler is not linear.
    """

    noise: NDArray[np.float32]
    picture: NDArray[np.float32]
    levels: NDArray[np.float32]
    conditioning: dict[str, NDArray[np.generic]]
    schedule: DdimSchedule | LinearWalk | None

    def sample(self, step: int) -> NDArray[np.float32]:
        """What the denoiser sees at a step of the schedule, [N, ...]."""
        signal, noise = self.levels[step]
        return np.asarray(signal * self.picture + noise * self.noise, np.float32)

    @property
    def digest(self) -> str:
        """Hash of the conditioning."""
        hashed = hashlib.sha256()
        for name, value in sorted(self.conditioning.items()):
            hashed.update(f"{name} {value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
        return hashed.hexdigest()


def probe_of(bundle: Bundle, samples: int, seed: int) -> Probe:
    """The questions for a bundle.

    Args:
        samples: Batch size, N.
    """
    (info,) = bundle.manifest.input("sample")
    shape = tuple(int(side or COARSE) for side in info.shape)
    random = np.random.RandomState(seed)  # its streams are frozen for good (NEP 19)
    noise = random.standard_normal((samples, *shape)).astype(np.float32)
    coarse = random.uniform(-1, 1, (samples, *shape[:1], *(-(-side // COARSE) for side in shape[1:])))
    for axis, side in enumerate(shape[1:], start=2):
        coarse = coarse.repeat(COARSE, axis).take(range(side), axis)
    schedule, conditioning = schedule_of(bundle), stored_prompts(bundle, samples)
    return Probe(noise, coarse.astype(np.float32), _levels(bundle, schedule), conditioning, schedule)


def predictions(loaded: LoadedBundle, probe: Probe) -> list[NDArray[np.generic]]:
    """What a bundle predicts at every timestep of its schedule, in order."""
    denoise = _at_once(loaded, probe.conditioning)
    timesteps = loaded.bundle.manifest.timesteps.values
    return [denoise(probe.sample(step), timestep) for step, timestep in enumerate(timesteps)]


def images(loaded: LoadedBundle, probe: Probe) -> NDArray[np.float32] | None:
    """Images drawn from the probe's noise: pictures in 0..1, latents as they are; None where numpy cannot draw."""
    if probe.schedule is None:
        return None
    images = drawn(loaded, probe.noise, probe.schedule, probe.conditioning)
    return as_pictures(images) if is_picture(images.shape) else images


def _at_once(
    loaded: LoadedBundle, conditioning: dict[str, NDArray[np.generic]]
) -> Callable[[NDArray[np.float32], float], NDArray[np.generic]]:
    prompt = loaded.prepare(**conditioning)
    return lambda sample, timestep: loaded(sample, timestep, prompt=prompt)


def _levels(bundle: Bundle, schedule: DdimSchedule | LinearWalk | None) -> NDArray[np.float32]:
    if not isinstance(schedule, DdimSchedule):
        return np.tile(np.asarray([0, 1], np.float32), (len(bundle.manifest.timesteps), 1))
    return np.stack([np.sqrt(schedule.alphas), np.sqrt(1 - schedule.alphas)], 1).astype(np.float32)
