"""Sampling in numpy: DDIM (Song et al. 2021, equation 12 with eta = 0), and what a bundle's own scheduler weighs.

    x_0  = (x_t - sqrt(1 - a_t) e) / sqrt(a_t)          e: the predicted noise, a: cumulative alphas
    x_t' = sqrt(a_t') x_0 + sqrt(1 - a_t') e            t': the timestep before t

Schedules and formulas are those of ``diffusers.DDIMScheduler``, which reads the same configuration.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.limits import LONGEST_SCHEDULE
from tfmq_export.recipe.plain import read_json

Denoise = Callable[[NDArray[np.float32], float], NDArray[Any]]
"""``denoise(sample, timestep) -> prediction``."""

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
"""Classes whose configuration describes a schedule that DDIM can walk."""

_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
"""What ``DDIMScheduler.from_config`` assumes where a configuration is silent."""

_RANGES: Mapping[str, tuple[Any, float, float]] = {
    "num_train_timesteps": (int, 1, LONGEST_SCHEDULE),
    "steps_offset": (int, -LONGEST_SCHEDULE, LONGEST_SCHEDULE),
    "beta_start": (int | float, 0, 1),
    "beta_end": (int | float, 0, 1),
    "clip_sample_range": (int | float, 0, sys.float_info.max),
}


@dataclass(frozen=True, slots=True, eq=False)
class DdimSchedule:
    """The walk from noise to image.

    Attributes:
        timesteps: int64, [S], from the noisiest.
        alphas: float32, [S]; cumulative alpha at each timestep.
        alphas_next: float32, [S]; the one the step moves to.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clip: Largest magnitude of the predicted image, or None.
    """

    timesteps: NDArray[np.int64]
    alphas: NDArray[np.float32]
    alphas_next: NDArray[np.float32]
    prediction_type: str
    clip: float | None

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"prediction_type {self.prediction_type!r} is unknown; DDIM takes epsilon, v_prediction or sample"
            )
        if not np.isfinite(self.alphas).all():
            raise ConfigError(
                "the noise levels of this schedule are no finite numbers; give the betas it was trained on"
            )
        if self.prediction_type == "epsilon" and not (self.alphas > 0).all():
            raise ConfigError(
                f"timestep {self.timesteps[self.alphas <= 0][0]} is pure noise (rescale_betas_zero_snr), where a "
                "prediction of the noise says nothing about the image; use v_prediction or timestep_spacing leading"
            )
        if self.prediction_type == "sample" and not (self.alphas < 1).all():
            raise ConfigError(
                f"timestep {self.timesteps[self.alphas >= 1][0]} has no noise to remove; raise beta_start"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], steps: int) -> "DdimSchedule":
        """Read a diffusers scheduler configuration (``scheduler_config.json``).

        Raises:
            ConfigError: an option DDIM does not have, or a number of steps the schedule cannot give.
        """
        kind = config.get("_class_name", "DDIMScheduler")
        if kind not in SCHEDULERS:
            raise ConfigError(f"no DDIM schedule in a {kind} configuration; use one of {', '.join(SCHEDULERS)}")
        options = _checked({name: config.get(name, default) for name, default in _DEFAULTS.items()})
        if options["thresholding"]:
            raise ConfigError("thresholding is not supported by this sampler; set it to false or sample with diffusers")
        train_steps: int = options["num_train_timesteps"]
        alphas = cumulative_alphas(betas_from(options))  # [T]
        timesteps = spaced_timesteps(options["timestep_spacing"], train_steps, steps, options["steps_offset"])
        outside = timesteps[(timesteps < 0) | (timesteps >= len(alphas))]
        if outside.size:
            raise ConfigError(
                f"{steps} steps with {options['timestep_spacing']} spacing and steps_offset {options['steps_offset']} "
                f"reach timestep {outside[0]}, the model knows 0..{len(alphas) - 1}; take other steps"
            )
        following = timesteps - train_steps // steps
        last = np.float32(1) if options["set_alpha_to_one"] else alphas[0]
        return cls(
            timesteps=timesteps,
            alphas=alphas[timesteps],
            alphas_next=np.where(following >= 0, alphas[np.maximum(following, 0)], last).astype(np.float32),
            prediction_type=options["prediction_type"],
            clip=float(options["clip_sample_range"]) if options["clip_sample"] else None,
        )

    def last(self, strength: float) -> "DdimSchedule":
        """The part of the walk that is left for a sample noised part of the way, as img2img pipelines count.

        Args:
            strength: Share of the walk, above 0 and up to 1.
        Raises:
            ConfigError: a strength that leaves no step.
        """
        steps = len(self.timesteps)
        left = min(int(steps * strength), steps) if 0 < strength <= 1 else 0
        if not left:
            raise ConfigError(f"strength {strength:g} of {steps} steps leaves none; give more, up to 1")
        begin = steps - left
        return replace(
            self,
            timesteps=self.timesteps[begin:],
            alphas=self.alphas[begin:],
            alphas_next=self.alphas_next[begin:],
        )

    def noised(self, images: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images with the noise of the first timestep, [N, ...]: where ``sample`` begins."""
        alpha = self.alphas[0]
        return (np.sqrt(alpha) * images + np.sqrt(1 - alpha) * noise).astype(np.float32)

    def step(self, index: int, sample: NDArray[np.float32], prediction: NDArray[np.float32]) -> NDArray[np.float32]:
        """Move the sample from ``timesteps[index]`` to the next timestep."""
        signal, noise = np.sqrt(self.alphas[index]), np.sqrt(1 - self.alphas[index])
        if self.prediction_type == "epsilon":
            image, epsilon = (sample - noise * prediction) / signal, prediction
        elif self.prediction_type == "sample":
            image, epsilon = prediction, (sample - signal * prediction) / noise
        else:
            image, epsilon = signal * sample - noise * prediction, signal * prediction + noise * sample
        if self.clip is not None:
            image = image.clip(-self.clip, self.clip)
        alpha = self.alphas_next[index]
        return (np.sqrt(alpha) * image + np.sqrt(1 - alpha) * epsilon).astype(np.float32)


def schedule_of(bundle: Bundle) -> DdimSchedule | LinearWalk | None:
    """How a bundle draws, in numpy; None where its scheduler is not linear, or a pipeline or function draws.

    Raises:
        LoadError: a file of the bundle cannot be read.
    """
    manifest = bundle.manifest
    if manifest.sampler.kind != "DDIMScheduler" or not bundle.scheduler.is_file():
        return LinearWalk.read(bundle)
    try:
        schedule = DdimSchedule.from_config(read_json(bundle.scheduler), manifest.sampler.steps)
    except ConfigError:
        return None  # an option that DDIM in numpy does not have, such as thresholding
    except (OSError, ValueError) as error:
        raise LoadError(f"{bundle.scheduler}: not a readable scheduler configuration ({error})") from error
    return schedule if tuple(schedule.timesteps.tolist()) == manifest.timesteps.values else None


def sample(
    denoise: Denoise,
    noise: NDArray[np.float32],
    schedule: DdimSchedule | LinearWalk,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Draw images.

    Args:
        noise: Standard normal, [N, ...].
        progress: Called after each step with the steps done and their total.
    Returns:
        Images as the model was trained on them, [N, ...].
    """
    current = noise.astype(np.float32)
    seen = [current]
    if isinstance(schedule, LinearWalk):
        current = schedule.start(current)
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        prediction = np.asarray(denoise(current, timestep), np.float32)
        if prediction.shape[1:2] == (2 * current.shape[1],):
            prediction = prediction[:, : current.shape[1]]  # learned variances (DiT), which neither reads
        if prediction.shape != current.shape:
            raise ConfigError(f"the denoiser gave {list(prediction.shape)} for a sample of {list(current.shape)}")
        if isinstance(schedule, LinearWalk):
            seen.append(prediction)
            current = schedule.mixed(index + 1, seen)
        else:
            current = schedule.step(index, current, prediction)
        if progress is not None:
            progress(index + 1, len(schedule.timesteps))
    return current


@runtime_checkable
class PreparesPrompts(Protocol):
    """A denoiser that does once what the prompt decides: ``LoadedBundle``."""

    def prepare(self, **conditioning: NDArray[Any]) -> Any:
        """What calls take as ``prompt`` in place of the conditioning."""
        ...


def prompted(denoise: Callable[..., NDArray[Any]], conditioning: Mapping[str, NDArray[Any]]) -> Denoise:
    """The denoiser of one prompt, which is prepared here, once for all steps.

    Args:
        denoise: ``denoise(sample, timestep, **conditioning)``.
        conditioning: [N, ...] by input name.
    """
    if isinstance(denoise, PreparesPrompts):
        prompt = denoise.prepare(**conditioning)
        return lambda sample, timestep: denoise(sample, timestep, prompt=prompt)
    return lambda sample, timestep: denoise(sample, timestep, **conditioning)


def guided(
    denoise: Callable[..., NDArray[Any]],
    conditioning: Mapping[str, NDArray[Any]],
    unconditional: Mapping[str, NDArray[Any]],
    guidance_scale: float,
) -> Denoise:
    """Classifier-free guidance, both halves in one batch: ``u + guidance_scale * (c - u)``.

    A scale of 1 leaves the conditional half alone and runs nothing else.

    Args:
        denoise: ``denoise(sample, timestep, **conditioning)``.
        conditioning: [N, ...] by input name.
        unconditional: [...] by input name, the same for every sample.
    """
    if guidance_scale <= 1:  # as in diffusers' pipelines
        return prompted(denoise, conditioning)
    if missing := conditioning.keys() - unconditional.keys():
        raise ConfigError(
            f"no unconditional value for {', '.join(sorted(missing))}; guidance needs one, or a guidance_scale of 1"
        )
    both = {}
    for name, value in conditioning.items():
        if unconditional[name].shape != value.shape[1:]:
            raise ConfigError(
                f"{name}: unconditional shape {list(unconditional[name].shape)}, needs {list(value.shape[1:])}"
            )
        null = np.broadcast_to(unconditional[name].astype(value.dtype), value.shape)
        both[name] = np.concatenate([null, value])  # [2N, ...]

    denoise_both = prompted(denoise, both)

    def denoise_guided(sample: NDArray[np.float32], timestep: float) -> NDArray[Any]:
        null, given = np.split(denoise_both(np.concatenate([sample, sample]), timestep), 2)
        return np.asarray(null + np.float32(guidance_scale) * (given - null))

    return denoise_guided


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same options, if their values can be computed with.

    Raises:
        ConfigError: names the first that cannot.
    """
    for name, (kind, low, high) in _RANGES.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise ConfigError(f"scheduler: {name} is {str(value)[:40]}; give a number from {low} to {high}")
    betas = options["trained_betas"]
    if betas is not None:
        plain = isinstance(betas, list) and all(isinstance(each, int | float) and 0 <= each <= 1 for each in betas)
        if not plain or not betas:
            raise ConfigError("scheduler: trained_betas must be numbers from 0 to 1")
    return options


def betas_from(options: Mapping[str, Any]) -> NDArray[np.float32]:
    """Noise added at each training timestep, float32, [T]."""
    count, start, end = options["num_train_timesteps"], options["beta_start"], options["beta_end"]
    schedule = options["beta_schedule"]
    if options["trained_betas"] is not None:
        betas = np.asarray(options["trained_betas"], np.float32)
    elif schedule == "linear":
        betas = np.linspace(start, end, count, dtype=np.float32)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2
    elif schedule == "squaredcos_cap_v2":
        bar = [math.cos((t / count + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(count + 1)]
        betas = np.asarray([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(count)], np.float32)
    else:
        raise ConfigError(f"beta_schedule {schedule!r} is unknown; use linear, scaled_linear or squaredcos_cap_v2")
    return _with_zero_terminal_snr(betas) if options["rescale_betas_zero_snr"] else betas


def cumulative_alphas(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Share of the signal left after each timestep, float32, [T]."""
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def spaced_timesteps(spacing: str, train_steps: int, steps: int, offset: int) -> NDArray[np.int64]:
    """The timesteps DDIM visits, int64, [S] (Lin et al. 2024, table 2)."""
    if not 1 <= steps <= train_steps:
        raise ConfigError(f"steps must be in 1..{train_steps}, got {steps}")
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (train_steps // steps) + offset
    if spacing == "trailing":
        # Rounding can carry the range one step too far, to timestep -1 (999 over 23 steps); diffusers walks there.
        return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64)[:steps] - 1
    raise ConfigError(f"timestep_spacing {spacing!r} is unknown; use leading, trailing or linspace")


def _with_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shift and scale the signal so that the last timestep has none (Lin et al. 2024, algorithm 1)."""
    signal = np.sqrt(cumulative_alphas(betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    bar = signal**2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
