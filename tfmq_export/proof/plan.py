"""How much is proven: as much as was asked for, or what a budget of time allows.

A U-Net of Stable Diffusion's size takes a quarter of an hour for one image on two cores; sixteen of them, drawn twice,
would take longer than everything before. So one call is timed, and what the proof would take is worked out. Less is
compared where it would be too long, never less than one image and ``FEWEST`` timesteps; the report says how much was.
"""

import time
from dataclasses import dataclass

import torch

from tfmq_export.capture.denoiser import Denoiser, SeededSampler
from tfmq_export.proof.kernels import BOTH_HALVES, EXTREME, TIMESTEPS
from tfmq_export.proof.speed import ROUNDS, SECONDS, WARM_UP

USUAL_IMAGES = 16
USUAL_SECONDS = 30 * 60.0
FEW_IMAGES = 4  # drawn by the graph in floating point as well
FEWEST = 5  # timesteps of the schedule in lock-step
SERVED, DEFINED, SIMULATED = 0.6, 1.2, 1.5
"""What a call takes of the bundle, of its graph in floating point and of fake-quant, in calls of the model; as measured
on CPUs. In lock-step fake-quant runs twice, once on its own way."""

SAMPLING = "Sampling in full precision"
SERVING = "Sampling in integers"
STEPPING = "Comparing step by step"
DEFINING = "Checking the kernels against the graph"
ALONE = "Checking each kernel alone"
AGREEING = "Checking the graph against fake-quant"
READING = "Reading the optimized graph"
"""Titles of a proof's stages, in order."""
TOGETHER = 8  # rows of a call whose images are drawn together
QUICK = 0.5  # seconds of a call that is worth repeating with more rows


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
        row: One row through the model, of as many as it is called with.
        rows: Of one image in a call: two with guidance.
        calls: Of the schedule.
        alone: One row through the model in a call of its own; as ``row`` if None.
    """

    row: float
    rows: int
    calls: int
    alone: float | None = None

    @property
    def single(self) -> float:
        """Seconds of a call with one row."""
        return self.row if self.alone is None else self.alone

    def image(self) -> float:
        """Drawing one image."""
        return self.row * self.rows * self.calls

    def stages(self, images: int, timesteps: int) -> dict[str, float]:
        """Seconds of each stage of a proof, by its title."""
        few = min(images, FEW_IMAGES)
        again = 0 if few == images else few
        kernels = len(BOTH_HALVES) * (min(TIMESTEPS, self.calls) + EXTREME) * self.row
        lock_step = len(BOTH_HALVES) * timesteps * self.row
        turn = len(BOTH_HALVES) * self.row * (1 + SERVED)
        timed = WARM_UP * turn + min(ROUNDS * turn, max(SECONDS, turn))
        return {
            SAMPLING: images * self.image(),
            SERVING: images * self.image() * SERVED,
            STEPPING: (images + again) * self.image() * SERVED + kernels * SERVED + timed,
            DEFINING: few * self.image() * DEFINED + kernels * DEFINED,
            AGREEING: lock_step * (DEFINED + 2 * SIMULATED),
        }

    def of(self, images: int, timesteps: int) -> float:
        """A whole proof."""
        return sum(self.stages(images, timesteps).values())


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
    """Time a call of the model on one example, behind a first one that reads weights from a disk.

    Small models take much less for a row when there are several in a call, so those are timed too.
    """
    single = min(_seconds(denoiser, 1), _seconds(denoiser, 1))
    several = _rows_of_a_call(denoiser) if single < QUICK else 1
    row = single if several <= 1 else min(_seconds(denoiser, several), _seconds(denoiser, several)) / several
    return Cost(min(row, single), _rows_of_an_image(denoiser), len(denoiser.timesteps), single)


def _rows_of_a_call(denoiser: Denoiser) -> int:
    """Rows of the calls that draw images."""
    sampler = denoiser.sampler
    return sampler.together * _rows_of_an_image(denoiser) if isinstance(sampler, SeededSampler) else TOGETHER


def _seconds(denoiser: Denoiser, rows: int) -> float:
    """Of one call with the example's first row, so often."""
    inputs = {
        name: value[:1].expand(rows, *value.shape[1:]) if value.ndim else value
        for name, value in denoiser.example_inputs.items()
    }
    sample, timestep = inputs.pop(denoiser.sample), inputs.pop(denoiser.timestep)
    start = time.perf_counter()
    denoiser.module_denoise()(sample, timestep, **inputs)
    return time.perf_counter() - start


def _rows_of_an_image(denoiser: Denoiser) -> int:
    call = denoiser.call
    if call is not None:
        return max(1, call.rows_per_image) * call.calls_per_step
    return 1 if denoiser.sampler_info.guidance_scale == 1 else 2
