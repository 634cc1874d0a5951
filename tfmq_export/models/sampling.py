"""Drawing images with a diffusers scheduler."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from tfmq_export.denoiser import Conditioning, Denoise
from tfmq_export.errors import ConfigError
from tfmq_export.timesteps import TimestepSet


@dataclass(frozen=True, slots=True)
class DiffusersSampler:
    """A diffusers scheduler run for a number of steps, with classifier-free guidance.

    Attributes:
        scheduler: A template; every run works on its own copy.
        unconditional: The "no prompt" value of each conditioning input, [...] by name.
        guidance_scale: 1 means a single conditional pass.
    """

    scheduler: SchedulerMixin
    steps: int
    unconditional: Conditioning
    guidance_scale: float = 1.0

    def _fresh(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        try:
            scheduler.set_timesteps(self.steps)
        except ValueError as error:
            raise ConfigError(f"{type(scheduler).__name__} cannot run {self.steps} steps: {error}") from error
        return scheduler

    @property
    def timesteps(self) -> TimestepSet:
        """The timesteps a run visits, each once (multistep schedulers repeat some)."""
        visited = self._fresh().timesteps.numpy()
        _, first = np.unique(visited, return_index=True)
        return TimestepSet.of(visited[np.sort(first)])

    def __call__(self, denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Denoise ``noise`` [N, ...] to images, conditional and unconditional halves in one batch."""
        scheduler = self._fresh()
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(0)
        guided = self.guidance_scale != 1.0 and bool(self.unconditional)
        if guided:
            conditioning = {
                name: torch.cat([self.unconditional[name].expand(len(noise), *value.shape[1:]), value])
                for name, value in conditioning.items()
            }
        sample = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, timestep)
            if guided:
                without, given = denoise(torch.cat([scaled, scaled]), timestep, **conditioning).chunk(2)
                prediction = without + self.guidance_scale * (given - without)
            else:
                prediction = denoise(scaled, timestep, **conditioning)
            sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
        return sample


def ddim_from_config(config: Mapping[str, object], where: str) -> DDIMScheduler:
    """The DDIM scheduler over the noise schedule a model was trained with."""
    known = {"num_train_timesteps", "beta_schedule", "trained_betas"}
    if not known & set(config):
        raise ConfigError(f"{where}: no noise schedule that DDIM can run; pass a sampler with --factory")
    try:
        return DDIMScheduler.from_config(dict(config))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{where}: DDIM cannot run this scheduler configuration: {error}") from error
