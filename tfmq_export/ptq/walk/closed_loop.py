"""Fitting a correction where the quantized network is: step by step on its own trajectories.

Images are drawn three times from the same noise: in full precision, by the quantized network, and by the quantized
network under the correction. In the third run each step is fitted on some of the images, and is kept if it brings the
others nearer to what full precision predicts there; the run goes on with what was kept, so each step corrects what
earlier ones left. In the end the images that nothing was fitted on decide whether there is a correction at all.

Where quantized runs end at other pictures altogether (a model of random weights, whose runs are chaotic), their
predictions say little of full precision's, and the fit draws them to the mean of all. That is a gain in dB and no
better picture. It shows on full precision's own path, where such a correction ruins the predictions: so images must
gain more than predictions lose there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser, Run
from tfmq_export.progress import Step
from tfmq_export.ptq.correction import corrected, fit_correction
from tfmq_export.ptq.walk.calibration import evenly, repeat
from tfmq_export.recipe.correction import IDENTITY

LEAST_GAIN = 0.2
"""dB that held-out images must gain on average; less is not worth its place in the graph."""
CHECKED = 8  # timesteps, evenly, at which predictions are looked at on full precision's own path

Used = Callable[[Tensor], Tensor]
"""From the rows of a call to the prediction that the sampler steps with: guidance, where there is any."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """How the images of a fit are drawn.

    Attributes:
        run: Draws all of them together, one call for each timestep.
        used: Of the rows of a call, [R, C, ...]; gives [N, C, ...] for the run's N images. Every part of the rows has
            the images in the same order.
        fitted: Images to fit on, the first ones.
        rows: Of a network's call at most: many rows of a large model do not fit in memory.
    """

    run: Run
    used: Used
    fitted: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class ClosedLoop:
    """What the fit found.

    Attributes:
        rows: float32 [T, 3, C].
        kept: At how many timesteps the held-out images came nearer.
        gain: Of each held-out image, dB, [H].
        loss: Of their predictions on full precision's own path, the mean over some timesteps, dB.
    """

    rows: Tensor
    kept: int
    gain: Tensor
    loss: float

    @property
    def holds(self) -> bool:
        """Whether the images that it was not fitted on gain, on average, and more than predictions lose."""
        return self.kept > 0 and float(self.gain.mean()) >= max(LEAST_GAIN, self.loss)

    @property
    def uncertainty(self) -> float:
        """Standard error of the mean gain, dB."""
        return float(self.gain.std()) / len(self.gain) ** 0.5 if len(self.gain) > 1 else 0.0


@torch.no_grad()
def fit_in_closed_loop(denoiser: Denoiser, quantized: Denoise, drawing: Drawing, progress: Step) -> ClosedLoop:
    """Fit a correction on the first images of a run and judge it by the others.

    Args:
        denoiser: The full-precision model.
        quantized: Predicts like the quantized network, without a correction.
    """
    calls, total = 0, 3 * len(denoiser.timesteps)
    looked_at = evenly(range(len(denoiser.timesteps)), CHECKED)

    def counted(denoise: Denoise) -> Denoise:
        def told(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            progress(min(calls, total), total)
            return denoise(sample, timestep, **conditioning)

        return told

    wanted: list[Tensor] = []
    on_path: list[_OnPath] = []
    plain = _in_pieces(denoiser.module_denoise(), drawing.rows)
    quantized = _in_pieces(quantized, drawing.rows)

    def recording(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        prediction = plain(sample, timestep, **conditioning)
        wanted.append(drawing.used(prediction))
        if len(wanted) - 1 in looked_at:
            found = drawing.used(quantized(sample, timestep, **conditioning))
            on_path.append(_OnPath(_place(denoiser, timestep), found, sample[: len(found)], wanted[-1]))
        return prediction

    reference, uncorrected = (repeat(drawing.run, counted(each)) for each in (recording, quantized))
    fit = _Fit(denoiser, quantized, wanted, drawing)
    drawn = repeat(drawing.run, counted(fit))
    reference, uncorrected, drawn = (images[drawing.fitted :] for images in (reference, uncorrected, drawn))
    gain = 10 * (_errors(uncorrected, reference) / _errors(drawn, reference)).log10()
    losses = [each.loss(fit.rows, drawing.fitted) for each in on_path]
    return ClosedLoop(fit.rows.float(), fit.kept, gain, sum(losses) / len(losses))


@dataclass(frozen=True, slots=True, eq=False)
class _OnPath:
    """A call of the full-precision run, and what the quantized network predicts there.

    Attributes:
        place: Of its timestep in the schedule.
        found: Without a correction, [N, C, ...].
    """

    place: int
    found: Tensor
    sample: Tensor
    wanted: Tensor

    def loss(self, rows: Tensor, fitted: int) -> float:
        """What a correction makes worse, for the held-out images, dB."""
        found, sample, wanted = (value[fitted:] for value in (self.found, self.sample, self.wanted))
        after = corrected(rows[self.place], found, sample)
        return 10 * math.log10(float(_errors(after, wanted).sum() / _errors(found, wanted).sum()))


def _place(denoiser: Denoiser, timestep: Any) -> int:
    """Of a call's timestep in the schedule."""
    example = denoiser.example_inputs[denoiser.timestep]
    (place,) = denoiser.timesteps.rows(torch.as_tensor(timestep).reshape(-1)[:1].to(example.dtype).numpy())
    return int(place)


class _Fit:
    """A quantized network that is corrected while it draws.

    Args:
        wanted: What full precision predicted at each call, as it was used.
    """

    def __init__(self, denoiser: Denoiser, quantized: Denoise, wanted: Sequence[Tensor], drawing: Drawing) -> None:
        self._denoiser, self._quantized, self._wanted, self._drawing = denoiser, quantized, wanted, drawing
        self._calls = 0
        self.rows = torch.tensor(IDENTITY, dtype=torch.float64)[:, None].repeat(
            len(denoiser.timesteps), 1, wanted[0].shape[1]
        )
        self.kept = 0

    def __call__(self, sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        prediction = self._quantized(sample, timestep, **conditioning)
        place = _place(self._denoiser, timestep)
        wanted, found = self._wanted[self._calls], self._drawing.used(prediction)
        self._calls += 1
        given = sample[: len(found)]  # with guidance every part of the batch has the same samples
        some, others = slice(0, self._drawing.fitted), slice(self._drawing.fitted, None)
        rows = fit_correction(found[some], given[some], wanted[some]).float().double()  # as it will be stored
        left = corrected(rows, found[others], given[others])
        if rows.isfinite().all() and _errors(left, wanted[others]).sum() < _errors(found[others], wanted[others]).sum():
            self.rows[place] = rows
            self.kept += 1
        return corrected(self.rows[place], prediction, sample)


def _in_pieces(denoise: Denoise, rows: int) -> Denoise:
    """The same predictions from calls of so many rows."""

    def told(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        def part(value: Any, start: int) -> Any:  # a timestep may be one for all rows
            each = isinstance(value, Tensor) and value.ndim and len(value) == len(sample)
            return value[start : start + rows] if each else value

        return torch.cat(
            [
                denoise(
                    part(sample, start),
                    part(timestep, start),
                    **{name: part(value, start) for name, value in conditioning.items()},
                )
                for start in range(0, len(sample), rows)
            ]
        )

    return told


def _errors(values: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each image, float64 [N]."""
    return (values - wanted).double().square().flatten(1).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
