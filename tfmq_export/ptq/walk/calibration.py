"""Calibration: the full-precision model watched along its own sampling trajectory.

Every step of one trajectory is recorded, so T steps cost T model calls (Q-Diffusion draws a fresh
batch for every step: T^2). With guidance the conditional and unconditional halves run together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser, Run
from tfmq_export.errors import CalibrationError
from tfmq_export.progress import Step

T = TypeVar("T")
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples fall evenly between 0 and 1


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


def evenly(items: Sequence[T], most: int) -> tuple[T, ...]:
    """So many of all, such as of the calls of a trajectory; the first and the last among them."""
    if most >= len(items):
        return tuple(items)
    return tuple(items[int(place)] for place in np.linspace(0, len(items) - 1, most).round())


@torch.no_grad()
def record(
    denoiser: Denoiser, denoise: Denoise, runs: Sequence[Run], progress: Step, seed: int = 0
) -> tuple[tuple[CalibrationStep, ...], Tensor]:
    """Sample once and keep every model call.

    Args:
        denoise: Predicts, on behalf of ``denoiser``.
        runs: From ``denoiser.runs``.
        seed: Of torch's own generator meanwhile: a sampler that draws from it draws the same in every run.
    Returns:
        The calls in order, those of several runs put together where they are at the same timestep; and the images.
    """
    recorded: list[list[CalibrationStep]] = []
    images: list[Tensor] = []

    def recording(sample: Tensor, timestep: Any, /, **given: Tensor) -> Tensor:
        prediction = denoise(sample, timestep, **given)
        inputs = denoiser.inputs(sample, timestep, given)
        steps = recorded[-1]
        steps.append(CalibrationStep({name: value.clone() for name, value in inputs.items()}, prediction))
        expected = max(len(steps), len(recorded[0]), len(denoiser.timesteps))  # warm-ups visit some timesteps twice
        progress((len(recorded) - 1) * expected + len(steps), len(runs) * expected)
        return prediction

    for run in runs:
        recorded.append([])
        images.append(repeat(run, recording, seed))
    return _together(denoiser, recorded), torch.cat(images)


def repeat(run: Run, denoise: Denoise, seed: int = 0) -> Tensor:
    """Draw with torch's own generator in a known state, as every run of a ``record`` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run(denoise)


def _together(denoiser: Denoiser, runs: Sequence[Sequence[CalibrationStep]]) -> tuple[CalibrationStep, ...]:
    """The calls of several runs as those of one: the first of each, the second of each, and so on."""
    timesteps = [[float(step.inputs[denoiser.timestep].reshape(-1)[0]) for step in run] for run in runs]
    sizes = [[[value.shape[1:] for value in step.inputs.values()] for step in run] for run in runs]
    alike = all(each == timesteps[0] for each in timesteps) and all(each == sizes[0] for each in sizes)
    if len(runs) == 1 or not alike:
        return tuple(step for run in runs for step in run)
    return tuple(_joined(steps) for steps in zip(*runs, strict=True))


def _joined(steps: Sequence[CalibrationStep]) -> CalibrationStep:
    given = [step.inputs for step in steps]
    inputs = {  # a timestep without a batch axis is the same for all
        name: torch.cat([each[name] for each in given]) if value.ndim else value for name, value in given[0].items()
    }
    return CalibrationStep(inputs, torch.cat([step.prediction for step in steps]))


def calibrate(denoiser: Denoiser, *, images: int, seed: int, progress: Step) -> tuple[CalibrationStep, ...]:
    """Record ``images`` images that the full-precision model draws.

    Raises:
        CalibrationError: the model predicted NaN or infinity.
    """
    steps, _ = record(denoiser, denoiser.module_denoise(), denoiser.runs(images, seed), progress)
    for step in steps:
        if not step.prediction.isfinite().all():
            at = step.inputs[denoiser.timestep].reshape(-1)[0]
            raise CalibrationError(
                f"{denoiser.source} predicted NaN or infinity on its own trajectory, at timestep {at:g}; "
                "check the checkpoint"
            )
    return steps


def shares(weights: Tensor, per_timestep: int, most: int) -> list[int]:
    """How many samples to take of each timestep: ``per_timestep`` on average, as many more as it counts more.

    Args:
        weights: How much each timestep counts, [T].
        most: Samples there are of a timestep; what one cannot take goes to the others.
    Returns:
        At least 1 and at most ``most`` each.
    """
    budget = per_timestep * len(weights)
    low, high = 0.0, float(budget * most / weights.clamp_min(1e-12).min())
    for _ in range(100):  # the count grows with the factor: halve the interval
        middle = (low + high) / 2
        if float((weights * middle).clamp(1, most).sum()) > budget:
            high = middle
        else:
            low = middle
    return [int(count) for count in (weights * low).clamp(1, most).round()]


def _of_one_size(denoiser: Denoiser, steps: Sequence[CalibrationStep]) -> Sequence[CalibrationStep]:
    if not denoiser.ragged:
        return steps
    wanted = {name: denoiser.example_inputs[name].shape[1:] for name in denoiser.ragged}
    kept = [step for step in steps if all(step.inputs[name].shape[1:] == shape for name, shape in wanted.items())]
    seen = {float(step.inputs[denoiser.timestep].reshape(-1)[0]) for step in kept}
    if len(seen) < len(denoiser.timesteps):
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in wanted.items())
        raise CalibrationError(
            f"{denoiser.source}: no prompt drawn for calibration is as long as the first ({sizes}); calibrate with "
            "more images, or give --prompts of one length"
        )
    return kept


def pick_rows(
    denoiser: Denoiser, steps: Sequence[CalibrationStep], per_timestep: int, weights: Tensor | None = None
) -> CalibrationRows:
    """Take samples of every recorded call, spread evenly over its batch.

    Where prompts are of several lengths, those of the example's: rows of a cache are of one size.

    Args:
        per_timestep: How many on average.
        weights: How much each timestep counts, [T]; None: all the same.
    """
    timesteps = len(denoiser.timesteps)
    steps = _of_one_size(denoiser, steps)
    batches = [len(step.inputs[denoiser.sample]) for step in steps]
    counts = shares(torch.ones(timesteps) if weights is None else weights, per_timestep, min(batches))
    picked: dict[str, list[Tensor]] = {name: [] for name in denoiser.example_inputs}
    positions: list[Tensor] = []
    for step in steps:
        batch = len(step.inputs[denoiser.sample])
        first = step.inputs[denoiser.timestep].reshape(-1)[:1].numpy()
        (place,) = denoiser.timesteps.rows(first)
        # Evenly over the batch, at every timestep from another start, so that all images are seen.
        starts = torch.arange(counts[place], dtype=torch.float64) / counts[place] + float(place) * GOLDEN_RATIO
        rows = (starts % 1 * batch).long()
        for name, value in step.inputs.items():
            picked[name].append(value.reshape(-1).expand(len(rows)) if value.ndim == 0 else value[rows])
        visited = picked[denoiser.timestep][-1].numpy()
        positions.append(torch.from_numpy(denoiser.timesteps.rows(visited)))
    one_timestep = denoiser.example_inputs[denoiser.timestep].ndim == 0
    order = torch.cat(positions).argsort(stable=True)
    inputs = {name: torch.cat(values)[order] for name, values in picked.items()}
    return CalibrationRows(inputs, torch.cat(positions)[order], timesteps, one_timestep)
