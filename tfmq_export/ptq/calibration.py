"""Calibration: the full-precision model watched along its own sampling trajectory.

Every step of one trajectory is recorded, so T steps cost T model calls (Q-Diffusion draws a fresh
batch for every step: T^2). With guidance the conditional and unconditional halves run together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_export.denoiser import Conditioning, Denoise, Denoiser
from tfmq_export.errors import CalibrationError
from tfmq_export.progress import Step


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationStep:
    """One recorded model call: its inputs by name, [N, ...], and the full-precision prediction."""

    inputs: Mapping[str, Tensor]
    prediction: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationRows:
    """Samples picked from a trajectory, timestep after timestep.

    Attributes:
        inputs: Of the graph, by name, [R, ...]; one timestep per row.
        steps: Position of each row's timestep in the schedule, int64 [R].
        timesteps: T.
        one_timestep: Whether the model takes a single timestep for the whole batch.
    """

    inputs: Mapping[str, Tensor]
    steps: Tensor
    timesteps: int
    one_timestep: bool

    def __len__(self) -> int:
        return len(self.steps)


@torch.no_grad()
def record(
    denoiser: Denoiser, denoise: Denoise, noise: Tensor, conditioning: Conditioning, progress: Step
) -> tuple[tuple[CalibrationStep, ...], Tensor]:
    """Sample once and keep every model call.

    Args:
        denoise: Predicts, on behalf of ``denoiser``.
        noise: [N, ...].
    Returns:
        The calls in order, and the final images.
    """
    steps: list[CalibrationStep] = []

    def recorded(sample: Tensor, timestep: Any, /, **given: Tensor) -> Tensor:
        prediction = denoise(sample, timestep, **given)
        inputs = denoiser.inputs(sample, timestep, given)
        steps.append(CalibrationStep({name: value.clone() for name, value in inputs.items()}, prediction))
        progress(len(steps), max(len(steps), len(denoiser.timesteps)))  # warm-ups visit some timesteps twice
        return prediction

    images = denoiser.sampler(recorded, noise, conditioning)
    return tuple(steps), images


def calibrate(denoiser: Denoiser, *, images: int, seed: int, progress: Step) -> tuple[CalibrationStep, ...]:
    """Record ``images`` images that the full-precision model draws.

    Raises:
        CalibrationError: the model predicted NaN or infinity.
    """
    noise, prompts = denoiser.noise(images, seed), denoiser.prompts(images)
    steps, _ = record(denoiser, denoiser.module_denoise(), noise, prompts, progress)
    for step in steps:
        if not step.prediction.isfinite().all():
            at = step.inputs[denoiser.timestep].reshape(-1)[0]
            raise CalibrationError(
                f"{denoiser.source} predicted NaN or infinity on its own trajectory, at timestep {at:g}; "
                "check the checkpoint"
            )
    return steps


def pick_rows(denoiser: Denoiser, steps: Sequence[CalibrationStep], per_timestep: int) -> CalibrationRows:
    """Take ``per_timestep`` samples of every recorded call, spread evenly over its batch."""
    picked: dict[str, list[Tensor]] = {name: [] for name in denoiser.example_inputs}
    positions: list[Tensor] = []
    for step in steps:
        batch = len(step.inputs[denoiser.sample])
        rows = torch.linspace(0, batch - 1, min(per_timestep, batch)).round().long()
        for name, value in step.inputs.items():
            picked[name].append(value.reshape(-1).expand(len(rows)) if value.ndim == 0 else value[rows])
        timesteps = picked[denoiser.timestep][-1]
        positions.append(torch.from_numpy(denoiser.timesteps.rows(timesteps.numpy())))
    one_timestep = denoiser.example_inputs[denoiser.timestep].ndim == 0
    order = torch.cat(positions).argsort(stable=True)
    inputs = {name: torch.cat(values)[order] for name, values in picked.items()}
    return CalibrationRows(inputs, torch.cat(positions)[order], len(denoiser.timesteps), one_timestep)
