"""Calibration: the full-precision model watched along its own sampling trajectory.

Every step of one trajectory is recorded, so T steps cost T model calls (Q-Diffusion draws a fresh
batch for every step: T^2). With guidance the conditional and unconditional halves run together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.denoiser import Conditioning, Denoise, Denoiser, first_tensor
from tfmq_export.program import DiffusionProgram
from tfmq_export.progress import Step
from tfmq_export.ptq.observers import Observation, merge, observe

VALUES_PER_STEP = 512


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationStep:
    """One recorded model call: its inputs by name, [N, ...], and the full-precision prediction."""

    inputs: Mapping[str, Tensor]
    prediction: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """A recorded trajectory.

    Attributes:
        steps: In sampling order.
        observations: By graph value: inputs of all quantizable operations, outputs of convolutions.
        images: What the trajectory ended in, [N, ...].
    """

    steps: tuple[CalibrationStep, ...]
    observations: Mapping[str, Observation]
    images: Tensor


class _Watcher(fx.Interpreter):
    """Runs the graph and shows chosen values to ``look``."""

    def __init__(self, module: fx.GraphModule, watched: frozenset[str], look: Callable[[str, Tensor], None]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would append lines to our own errors
        self.watched, self.look = watched, look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watched:
            self.look(n.name, value)
        return value


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
        progress(len(steps), len(denoiser.timesteps))
        return prediction

    images = denoiser.sampler(recorded, noise, conditioning)
    return tuple(steps), images


@torch.no_grad()
def calibrate(
    program: DiffusionProgram, denoiser: Denoiser, *, images: int, seed: int, progress: Step
) -> CalibrationSet:
    """Sample ``images`` images with the full-precision model and watch what flows.

    Raises:
        CalibrationError: a watched value was NaN or infinite.
    """
    watched = frozenset(op.input for op in program.operations)
    watched |= {op.name for op in program.operations if op.kind == "conv"}
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Observation]] = {name: [] for name in watched}

    def look(name: str, value: Tensor) -> None:
        parts[name].append(observe(value, VALUES_PER_STEP, generator))

    def denoise(sample: Tensor, timestep: Any, /, **given: Tensor) -> Tensor:
        inputs = denoiser.inputs(sample, timestep, given)
        return first_tensor(_Watcher(program.module, watched, look).run(*inputs.values()))

    steps, final = record(denoiser, denoise, denoiser.noise(images, seed), denoiser.prompts(images), progress)
    return CalibrationSet(steps, {name: merge(seen) for name, seen in parts.items()}, final)
