"""How a sampler sums the rows of a call, told from what it draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from nets.handwritten import silent
from nets.tiny_pipelines import stable_diffusion, unconditional
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Denoise, Denoiser, Description
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.ptq.walk.closed_loop import Drawing, fit_in_closed_loop
from tfmq_export.ptq.walk.row_sum import RowSum, row_sum

LEVELS = (3.0, 2.0, 1.0)


@dataclass
class Made:
    """A sampler whose rows are laid out and summed as a test says."""

    weights: tuple[float, ...] = (-1.5, 2.5)
    later: tuple[float, ...] = ()
    """Weights behind the first step."""
    interleaved: bool = False
    one_by_one: bool = False
    two_calls: bool = False
    squared: bool = False
    together: int = 8

    def draw(self, denoise: Denoise, seeds: Sequence[int], *, pictures: bool = False) -> Tensor:
        if self.one_by_one and len(seeds) > 1:
            return torch.cat([self.draw(denoise, [seed]) for seed in seeds])
        x = torch.stack([torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for level in LEVELS:
            weights = self.later if self.later and level != LEVELS[0] else self.weights
            parts = self.parts(denoise, x, level, len(weights))
            e = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)
            x = x - 0.3 * (e * e.abs() if self.squared else e)
        return x

    def parts(self, denoise: Denoise, x: Tensor, level: float, rows: int) -> Sequence[Tensor]:
        if self.two_calls:
            return [denoise(x, torch.full((len(x),), level)) for _ in range(rows)]
        given = x.repeat_interleave(rows, 0) if self.interleaved else x.repeat(rows, 1, 1, 1)
        found = denoise(given, torch.full((len(given),), level))
        return [found[row::rows] for row in range(rows)] if self.interleaved else found.chunk(rows)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(self.mix(sample)) * timestep[:, None, None, None] / 3


def denoiser_with(sampler: Made) -> Denoiser:
    example = {"sample": torch.randn(2, 2, 6, 6), "timestep": torch.tensor([3.0, 1.0])}
    described = describe(Net(), Description(example, lambda d, n, c: n, LEVELS), steps=None, source="Net")
    return replace(described, sampler=sampler)


@pytest.mark.parametrize("weights", [(1.0,), (-1.5, 2.5), (8.5, -7.5), (0.0, 1.0), (-0.5, -6.0, 7.5)])
def test_weights_are_found_by_what_is_drawn(weights: tuple[float, ...]) -> None:
    found = row_sum(denoiser_with(Made(weights)), seed=0)

    assert isinstance(found, RowSum)
    assert found.weights == pytest.approx(weights, abs=1e-3)


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (Made(interleaved=True), "not the images once for each part"),
        (Made(one_by_one=True), "once for each timestep with all images"),
        (Made(two_calls=True), "once for each timestep with all images"),
        (Made(later=(0.0, 1.0)), "the same at every timestep"),
        (Made(squared=True), "no sum of rows"),
        (Made((0.0, 0.0)), "do not follow its predictions"),
    ],
)
def test_what_is_no_such_sum_is_said(sampler: Made, reason: str) -> None:
    found = row_sum(denoiser_with(sampler), seed=0)

    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
        EulerDiscreteScheduler(),
        EulerAncestralDiscreteScheduler(),
        DPMSolverMultistepScheduler(),
    ],
    ids=lambda each: type(each).__name__,
)
def test_guidance_of_a_stock_pipeline(scheduler: SchedulerMixin, tmp_path: Path) -> None:
    denoiser = load(Source(stable_diffusion(tmp_path / "sd", scheduler), steps=5, guidance_scale=7.5))

    found = row_sum(denoiser, seed=2)

    assert isinstance(found, RowSum)
    assert found.weights == pytest.approx((-6.5, 7.5), abs=5e-3)


def test_a_stock_pipeline_that_visits_a_timestep_twice(tmp_path: Path) -> None:
    plms = PNDMScheduler(skip_prk_steps=True)

    found = row_sum(load(Source(stable_diffusion(tmp_path / "sd", plms), steps=5)), seed=2)

    assert isinstance(found, str)
    assert "once for each timestep" in found


def test_a_pipeline_without_a_prompt_has_one_row(tmp_path: Path) -> None:
    assert row_sum(load(Source(unconditional(tmp_path / "ddim"), steps=3)), seed=2) == RowSum((1.0,))


def test_a_fit_in_a_samplers_own_code_corrects_the_guided_prediction() -> None:
    denoiser = denoiser_with(Made())
    used = row_sum(denoiser, seed=0)
    assert isinstance(used, RowSum)
    plain = denoiser.module_denoise()

    def quantized(sample: Tensor, timestep: Tensor, /, **conditioning: Tensor) -> Tensor:
        return 0.8 * plain(sample, timestep) + 0.1 * sample + 0.05

    found = fit_in_closed_loop(denoiser, quantized, Drawing(denoiser.run_together(12, 0), used, 8, 16), silent)

    assert found.holds
    assert found.kept == len(LEVELS)
    assert float(found.gain.min()) > 10  # dB
