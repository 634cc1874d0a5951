"""Drawing images with a diffusers scheduler."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tfmq_export.capture.denoiser import Conditioning, Denoise
from tfmq_export.errors import ConfigError, first_line
from tfmq_export.limits import MOST_STEPS
from tfmq_export.recipe.timesteps import TimestepSet

LEARNED = ("learned", "learned_range")
"""Variances that a model predicts beside the noise; a scheduler without them reads none."""


@dataclass(frozen=True, slots=True)
class DiffusersSampler:
    """A diffusers scheduler run for a number of steps, with classifier-free guidance.

    Attributes:
        scheduler: A template; every run works on its own copy.
        unconditional: The "no prompt" value of each conditioning input, [...] by name.
        guidance_scale: 1 and less means a single conditional pass, as in diffusers' pipelines.
    """

    scheduler: SchedulerMixin
    steps: int
    unconditional: Conditioning
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.steps > MOST_STEPS:  # schedulers would make lists of them first
            raise ConfigError(
                f"{type(self.scheduler).__name__} cannot run {self.steps} steps; give {MOST_STEPS} at most"
            )

    @property
    def walk(self) -> Tensor:
        """The timestep of each model call of a whole run, [calls]; warm-ups repeat some."""
        calls: Tensor = self.fresh().timesteps
        return calls

    def walk_from(self, strength: float) -> Tensor:
        """The timestep of each model call of a run that starts part of the way, [calls].

        Raises:
            ConfigError: a strength that leaves no step, or a scheduler that cannot start there.
        """
        scheduler = self.fresh()
        calls: Tensor = scheduler.timesteps[self._begin(scheduler, strength) :]
        return calls

    @property
    def timesteps(self) -> TimestepSet:
        """The timesteps a run visits, each once."""
        return TimestepSet.visited(self.walk.numpy())

    @torch.no_grad()
    def __call__(self, denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Denoise ``noise`` [N, ...] to images, conditional and unconditional halves in one batch."""
        scheduler = self.fresh()
        # Flow matching starts from the noise itself and has no such factor.
        return self._run(scheduler, 0, denoise, noise * getattr(scheduler, "init_noise_sigma", 1.0), conditioning)

    @torch.no_grad()
    def from_images(
        self, denoise: Denoise, images: Tensor, noise: Tensor, conditioning: Conditioning, *, strength: float
    ) -> Tensor:
        """Noise images part of the way and denoise them again, as diffusers' img2img pipelines do.

        Args:
            images: As the model was trained on them, [N, ...].
            noise: Standard normal, [N, ...].
            strength: Share of the walk, above 0 and up to 1; its last timesteps are visited, which the table holds.
        """
        scheduler = self.fresh()
        begin = self._begin(scheduler, strength)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        start = scheduler.timesteps[begin : begin + 1].expand(len(images))
        noisy = getattr(scheduler, "scale_noise", None)
        sample = scheduler.add_noise(images, noise, start) if noisy is None else noisy(images, start, noise)
        return self._run(scheduler, begin, denoise, sample, conditioning)

    @property
    def guides(self) -> bool:
        """Whether a call has unconditional rows in front of the conditional ones."""
        return self.guidance_scale > 1 and bool(self.unconditional)

    def used(self, prediction: Tensor) -> Tensor:
        """The prediction that a step is taken with, [N, ...], of all rows of a call."""
        if not self.guides:
            return prediction
        without, given = prediction.chunk(2)
        return without + self.guidance_scale * (given - without)

    def fresh(self) -> Any:
        """A scheduler of one's own, set to the sampler's steps."""
        scheduler = copy.deepcopy(self.scheduler)
        try:
            scheduler.set_timesteps(self.steps)
        except Exception as error:  # the scheduler's own code, on its own configuration
            raise ConfigError(
                f"{type(scheduler).__name__} cannot run {self.steps} steps: {first_line(error)}; if its pipeline sets "
                "this, give the pipeline's folder, or a single model with --pipeline FOLDER"
            ) from error
        return scheduler

    def _begin(self, scheduler: Any, strength: float) -> int:
        """The first model call of a partial run, as diffusers' img2img pipelines count."""
        left = min(int(self.steps * strength), self.steps) if 0 < strength <= 1 else 0
        if not left:
            raise ConfigError(f"strength {strength:g} of {self.steps} steps leaves none; give more, up to 1")
        begin: int = (self.steps - left) * scheduler.order
        if begin and scheduler.config.get("skip_prk_steps") is False:
            raise ConfigError(f"{type(scheduler).__name__}: its Runge-Kutta warm-up starts at the top only; use plms")
        return begin

    def _run(self, scheduler: Any, begin: int, denoise: Denoise, sample: Tensor, conditioning: Conditioning) -> Tensor:
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(0)
        if self.guides:
            conditioning = {
                name: torch.cat([self.unconditional[name].expand(len(sample), *value.shape[1:]), value])
                for name, value in conditioning.items()
            }
        scaled_for = getattr(scheduler, "scale_model_input", _as_it_is)
        for timestep in scheduler.timesteps[begin:]:
            scaled = scaled_for(sample, timestep)
            rows = torch.cat([scaled, scaled]) if self.guides else scaled
            prediction = self.used(denoise(rows, timestep, **conditioning))
            prediction = without_variance(prediction, sample, scheduler.config.get("variance_type"))
            sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
        return sample


def require_finite_walk(sampler: DiffusersSampler) -> None:
    """Refuse a schedule that a step cannot be computed with.

    Noise levels are missing or no numbers; or it starts from pure noise with a model that predicts the noise, so that
    the first step divides by 0.

    Raises:
        ConfigError: says what to choose instead.
    """
    scheduler = sampler.fresh()
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None and not (alphas.ndim == 1 and alphas.isfinite().all()):
        raise ConfigError(f"{type(scheduler).__name__}: its noise levels (betas) are not a number for each timestep")
    if alphas is not None and int(scheduler.timesteps.max()) >= len(alphas):
        raise ConfigError(
            f"{type(scheduler).__name__}: visits timestep {scheduler.timesteps.max():g}, and has noise levels (betas) "
            f"for {len(alphas)}; correct its configuration"
        )
    if alphas is None or scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        return
    pure = [step for step in scheduler.timesteps.tolist() if float(alphas[int(step)]) <= 0]
    if pure:
        raise ConfigError(
            f"{type(scheduler).__name__}: timestep {pure[0]:g} is pure noise (rescale_betas_zero_snr), where a "
            "prediction of the noise says nothing about the image and the step divides by zero; use a model that "
            "predicts v (v_prediction), or timestep_spacing leading"
        )


def without_variance(prediction: Tensor, sample: Tensor, variance_type: object) -> Tensor:
    """The first half of the channels, where a model predicts variances too and the scheduler reads none (DiT)."""
    if prediction.shape[1] != 2 * sample.shape[1] or variance_type in LEARNED:
        return prediction
    return prediction[:, : sample.shape[1]]


def _as_it_is(sample: Tensor, timestep: Tensor) -> Tensor:
    return sample
