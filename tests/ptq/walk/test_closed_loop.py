from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from nets.handwritten import silent
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser, Description
from tfmq_export.models.factory import describe
from tfmq_export.ptq.correction import corrected
from tfmq_export.ptq.walk.closed_loop import ClosedLoop, Drawing, fit_in_closed_loop

STEPS = [40, 30, 20, 10]
IMAGES, FITTED = 12, 8


class Pull(nn.Module):
    """A network of one convolution, stronger at late timesteps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(self.mix(sample)) * (2 - timestep.float() / 40)


def sampler(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
    x = noise
    for timestep in STEPS:
        x = x - 0.3 * denoise(x, timestep)
    return x


def subject() -> Denoiser:
    example = {"sample": torch.randn(2, 2, 6, 6), "timestep": torch.tensor(40)}
    return describe(Pull(), Description(example, sampler, STEPS), steps=None, source="Pull")


def fit(
    quantize: Callable[[Tensor, Tensor, int], Tensor],
    denoise_seen: list[Tensor] | None = None,
    rows: int = IMAGES,
) -> ClosedLoop:
    """Fit against a network whose prediction is ``quantize(prediction, sample, timestep)``."""
    denoiser = subject()
    plain = denoiser.module_denoise()

    def quantized(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        if denoise_seen is not None:
            denoise_seen.append(sample)
        return quantize(plain(sample, timestep), sample, int(timestep))

    drawing = Drawing(denoiser.run_together(IMAGES, 0), lambda rows: rows, FITTED, rows)
    return fit_in_closed_loop(denoiser, quantized, drawing, silent)


def noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def test_what_repeats_in_every_image_is_corrected() -> None:
    found = fit(lambda e, x, t: 0.8 * e + 0.1 * x + 0.05)

    assert found.holds
    assert found.kept == len(STEPS)
    assert found.gain.shape == (IMAGES - FITTED,)
    assert float(found.gain.min()) > 10  # dB; shrinkage leaves a little


def test_each_step_is_fitted_where_the_corrected_steps_before_it_lead() -> None:
    seen: list[Tensor] = []

    found = fit(lambda e, x, t: 0.8 * e + 0.1 * x + 0.05, seen)

    seen = seen[len(STEPS) :]  # behind what full precision's run was compared with
    plain, under = seen[: len(STEPS)], seen[len(STEPS) :]
    assert torch.equal(plain[0], under[0])
    denoise = subject().module_denoise()
    for place, (timestep, sample, after) in enumerate(zip(STEPS, under, under[1:], strict=False)):
        distorted = 0.8 * denoise(sample, timestep) + 0.1 * sample + 0.05
        torch.testing.assert_close(after, sample - 0.3 * corrected(found.rows[place].double(), distorted, sample))
        assert not torch.equal(after, plain[place + 1])


def test_noise_is_no_gain_and_is_refused() -> None:
    errors: dict[tuple[int, int], Tensor] = {}
    found = fit(lambda e, x, t: e + errors.setdefault((t, len(e)), 0.02 * noise(e, t)))

    assert not found.holds


def test_a_timestep_at_which_the_held_out_images_lose_is_left_alone() -> None:
    side = torch.ones(IMAGES, 1, 1, 1)
    side[FITTED:] = -1  # fitted and held-out images err in opposite directions

    found = fit(lambda e, x, t: e + 0.3 * side if t == 20 else 0.8 * e)

    identity = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, 2)
    assert torch.equal(found.rows[STEPS.index(20)], identity)
    assert found.kept == len(STEPS) - 1
    assert not torch.equal(found.rows[0], identity)


def test_nothing_is_kept_where_nothing_is_wrong() -> None:
    found = fit(lambda e, x, t: e)

    assert found.kept == 0
    assert not found.holds


def test_a_mean_gain_below_the_bound_is_luck() -> None:
    found = fit(lambda e, x, t: 0.8 * e)

    assert found.holds
    assert not replace(found, gain=torch.full_like(found.gain, 0.1)).holds
    assert not replace(found, kept=0).holds
    assert not replace(found, loss=float(found.gain.mean()) + 1).holds


def test_a_correction_that_ruins_predictions_on_full_precisions_path_is_refused() -> None:
    """A network that is right on that path and predicts noise beside it: its runs are drawn to the mean of all."""
    on_path: list[Tensor] = []

    def chaotic(e: Tensor, x: Tensor, t: int) -> Tensor:
        if len(on_path) < len(STEPS):  # the calls that are made beside full precision's
            on_path.append(x)
            return e + 0.01 * noise(e, t)
        return noise(e, t + len(on_path)) * e.std()

    found = fit(chaotic)

    assert float(found.gain.mean()) > 0.2
    assert found.loss > float(found.gain.mean())
    assert not found.holds


def test_rows_that_are_computed_in_parts_give_the_same_fit() -> None:
    def distort(e: Tensor, x: Tensor, t: int) -> Tensor:
        return 0.8 * e + 0.1 * x

    whole, parts = fit(distort), fit(distort, rows=5)  # 12 images: the last part is smaller

    torch.testing.assert_close(parts.rows, whole.rows)
    torch.testing.assert_close(parts.gain, whole.gain, atol=1e-3, rtol=0)
