"""How much is proven: as much as was asked for, or what a budget of time allows.

A U-Net of Stable Diffusion's size takes a quarter of an hour for one image on two cores; sixteen of them, drawn twice,
would take longer than everything before. So one call is timed, and what the proof would take is worked out. Less is
compared where it would be too long, never less than one image and ``FEWEST`` timesteps; the report says how much was.
"""

import time
from dataclasses import dataclass

import torch

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.proof.kernels import BOTH_HALVES, EXTREME, TIMESTEPS

USUAL_IMAGES = 16
USUAL_SECONDS = 30 * 60.0
FEW_IMAGES = 4  # drawn by the graph in floating point as well
FEWEST = 5  # timesteps of the schedule in lock-step
SERVED, DEFINED, SIMULATED = 0.6, 1.2, 1.5
"""What a call takes of the bundle, of its graph in floating point and of fake-quant, in calls of the model; as measured
on CPUs. In lock-step fake-quant runs twice, once on its own way."""


@dataclass(frozen=True, slots=True)
class ProofPlan:
    """What is compared.

    Attributes:
        images: Drawn by the model and by the bundle.
        timesteps: Of the schedule, in lock-step with fake-quant.
        seconds: What it should take.
    """

    images: int
    timesteps: int
    seconds: float

    @property
    def few(self) -> int:
        """Images drawn by the graph in floating point as well."""
        return min(self.images, FEW_IMAGES)


@dataclass(frozen=True, slots=True)
class Cost:
    """What things take, in seconds.

    Attributes:
        row: One row through the model.
        rows: Of one image in a call: two with guidance.
        calls: Of the schedule.
    """

    row: float
    rows: int
    calls: int

    def of(self, images: int, timesteps: int) -> float:
        """A whole proof."""
        few = min(images, FEW_IMAGES)
        drawn = self.calls * self.rows * (images * (1 + 2 * SERVED) + few * (SERVED + DEFINED))
        kernels = len(BOTH_HALVES) * (min(TIMESTEPS, self.calls) + EXTREME) * (SERVED + DEFINED)
        lock_step = len(BOTH_HALVES) * timesteps * (DEFINED + 2 * SIMULATED)
        return self.row * (drawn + kernels + lock_step)


def plan_of(cost: Cost, images: int | None, budget: float) -> ProofPlan:
    """As many images as the budget allows, then as many timesteps.

    Args:
        images: As asked for: so many whatever they take; None for ``USUAL_IMAGES`` or fewer.
        budget: Seconds.
    """
    fewest = min(FEWEST, cost.calls)
    usual = next((n for n in range(USUAL_IMAGES, 1, -1) if cost.of(n, fewest) <= budget), 1)
    drawn = usual if images is None else images
    timesteps = next((n for n in range(cost.calls, fewest, -1) if cost.of(drawn, n) <= budget), fewest)
    return ProofPlan(drawn, timesteps, cost.of(drawn, timesteps))


@torch.no_grad()
def measured_cost(denoiser: Denoiser) -> Cost:
    """Time a call of the model on one example, behind a first one that reads weights from a disk."""
    denoise = denoiser.module_denoise()
    inputs = {name: value[:1] if value.ndim else value for name, value in denoiser.example_inputs.items()}
    sample, timestep = inputs.pop(denoiser.sample), inputs.pop(denoiser.timestep)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        denoise(sample, timestep, **inputs)
        seconds.append(time.perf_counter() - start)
    return Cost(min(seconds), _rows_of_an_image(denoiser), len(denoiser.timesteps))


def _rows_of_an_image(denoiser: Denoiser) -> int:
    call = denoiser.call
    if call is not None:
        return max(1, call.rows_per_image) * call.calls_per_step
    return 1 if denoiser.sampler_info.guidance_scale == 1 else 2
