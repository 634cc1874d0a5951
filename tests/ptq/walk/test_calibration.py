from pathlib import Path

import pytest
import torch
from nets.handwritten import CLASSES, PLAIN, captured, denoiser_of, probe, quantized, silent
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Conditioning, Denoise
from tfmq_export.capture.program import capture
from tfmq_export.config import Method
from tfmq_export.errors import CalibrationError, ConfigError
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate, pick_rows
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.io import save_recipe


def calibrated(name: str, images: int = 2, seed: int = 0) -> tuple[CalibrationStep, ...]:
    return calibrate(captured(name)[0], images=images, seed=seed, progress=silent)


@pytest.mark.parametrize("name", ["film_unet", "edm"])
def test_calibration_costs_one_model_call_per_timestep(name: str) -> None:
    denoiser = denoiser_of(name)
    calls: list[object] = []
    denoiser.module.register_forward_hook(lambda *_: calls.append(None))

    steps = calibrate(denoiser, images=2, seed=0, progress=silent)

    visited = [float(step.inputs[denoiser.timestep].reshape(-1)[0]) for step in steps]
    assert len(calls) == len(steps) == len(denoiser.timesteps)
    assert visited == [pytest.approx(value) for value in denoiser.timesteps.values]


def test_predictions_are_the_models_own() -> None:
    denoiser = denoiser_of("film_unet")

    for step in calibrate(denoiser, images=2, seed=0, progress=silent):
        x, t = step.inputs["x"], step.inputs["time"]
        with torch.no_grad():
            expected = denoiser.module(x, t.expand(len(x)))
        assert torch.equal(step.prediction, expected)


def test_guidance_runs_both_halves_in_every_call() -> None:
    found = calibrated("dit", images=3)

    for step in found:
        assert len(step.inputs["z"]) == 6
        assert step.inputs["y"].tolist() == [0, 1, 2, CLASSES, CLASSES, CLASSES]
        assert torch.equal(*step.inputs["z"].chunk(2))


class Wide(nn.Module):
    """Two layers whose values have ranges that are known: the input is -3..5, the product twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(2 * torch.eye(3)[:, :, None, None])
            self.last.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.conv(sample))


def test_ranges_are_those_of_the_models_own_trajectory() -> None:
    def between_the_ends(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = torch.linspace(-3, 5, noise.numel()).reshape(noise.shape)
        for t in (3, 1):
            denoise(x, t)
        return x

    denoiser = probe(Wide(), sampler=between_the_ends)
    steps = calibrate(denoiser, images=2, seed=0, progress=silent)
    plan = QuantPlan(
        "w8a8", 8, 8, PLAIN.model_copy(update={"estimator": "minmax"}), find_effort("fast", 8), frozenset({"conv"})
    )

    recipe = quantize(prepare(capture(denoiser), denoiser, steps, plan, {}), plan, silent)

    first, last = recipe.layers
    ends = {"first": (-3, 5, first.input), "between": (-6, 10, first.output), "last": (-6, 10, last.input)}
    for low, high, grid in ends.values():
        assert grid is not None
        reach = [float(grid.scale * (code - int(grid.zero_point))) for code in (grid.spec.qmin, grid.spec.qmax)]
        # The zero point is rounded to a code: either end moves by at most half a step; what is behind a quantized
        # value moves with it.
        before = float(first.output.scale) if grid is last.input else 0.0
        assert reach == pytest.approx([low, high], abs=0.51 * (float(grid.scale) + before))


def test_recorded_inputs_are_copies() -> None:
    def in_place(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise.clone()
        for t in (3, 1):
            x -= denoise(x, t)
        return x

    module = nn.Module()
    module.conv = nn.Conv2d(3, 3, 1)
    module.forward = lambda sample, timestep: module.conv(sample)  # type: ignore[method-assign]  # a wrapper
    denoiser = probe(module, sampler=in_place)

    found = calibrate(denoiser, images=2, seed=0, progress=silent)

    assert torch.equal(found[0].inputs["sample"], denoiser.noise(2, 0))
    assert not torch.equal(found[1].inputs["sample"], found[0].inputs["sample"])


def test_a_seed_gives_the_same_recipe_and_another_seed_another(tmp_path: Path) -> None:
    files = {}
    for label, seed in (("first", 0), ("again", 0), ("other", 1)):
        folder = tmp_path / label
        folder.mkdir()
        save_recipe(quantized("edm", 4, 6, Method(), seed).recipe, folder)
        files[label] = [path.read_bytes() for path in sorted(folder.iterdir())]

    assert files["first"] == files["again"]
    assert files["first"] != files["other"]


def test_a_model_that_turns_nan_is_refused_in_one_line() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.conv(sample.log())

    denoiser = probe(Bad())

    with pytest.raises(CalibrationError, match="NaN or infinity") as error:
        calibrate(denoiser, images=2, seed=0, progress=silent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["film_unet", "dit", "edm"])
def test_rows_are_whole_calls_in_the_order_of_the_schedule(name: str) -> None:
    denoiser, _ = captured(name)
    steps = calibrated(name, images=3)

    rows = pick_rows(denoiser, tuple(reversed(steps)), 2)

    per_call = min(2, len(steps[0].inputs[denoiser.sample]))
    assert rows.steps.tolist() == [step for step in range(len(steps)) for _ in range(per_call)]
    times = rows.inputs[denoiser.timestep]
    assert times.tolist() == [pytest.approx(denoiser.timesteps.values[step]) for step in rows.steps.tolist()]
    for row, step in enumerate(rows.steps.tolist()):
        batch = steps[step].inputs[denoiser.sample]
        assert any(torch.equal(rows.inputs[denoiser.sample][row], sample) for sample in batch)
    # Guidance puts the conditional half first: the ends of the batch are one of each half.
    assert name != "dit" or rows.inputs["y"][:2].tolist() == [0, CLASSES]


def test_rows_of_the_timesteps_together_come_from_every_image() -> None:
    denoiser = denoiser_of("edm")
    steps = calibrate(denoiser, images=6, seed=0, progress=silent)

    rows = pick_rows(denoiser, steps, 2)

    seen = set()
    for row, step in zip(rows.inputs[denoiser.sample], rows.steps.tolist(), strict=True):
        seen |= {image for image, sample in enumerate(steps[step].inputs[denoiser.sample]) if torch.equal(row, sample)}
    assert len(seen) > 2
    assert len(seen) == min(6, len(rows))


@pytest.mark.parametrize("given", [{}, {"label": torch.zeros(2, dtype=torch.long)}], ids=["forgotten", "misnamed"])
def test_a_sampler_that_passes_other_conditioning_is_told_so(given: dict[str, Tensor]) -> None:
    denoiser = denoiser_of("dit")

    with pytest.raises(ConfigError, match="the module takes y"):
        denoiser.module_denoise()(denoiser.noise(2, 0), 1.0, **given)
