"""From observed activations to a grid."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.fake_quant import Grid, fake_quantize
from tfmq_export.recipe.grid import QuantSpec

Cost = Callable[[Tensor, Tensor, Tensor, QuantSpec], Tensor]
"""Of values on a grid: ``cost(values, scale, zero_point, spec)``, a scalar."""

SHRINK_STEPS = 80
PERCENTILE = 0.9999
SMALLEST = 1e-8  # of a range; below it, a tensor counts as 0
BINS = 2048  # of the histogram that KL compares


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What one tensor showed over the calibration set.

    Attributes:
        low: Smallest value.
        high: Largest value.
        values: A sample of the values, [N], spread evenly over all steps.
    """

    low: float
    high: float
    values: Tensor

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            raise CalibrationError("the model produced NaN or infinity on its own trajectory; check the checkpoint")


@dataclass(frozen=True, slots=True, eq=False)
class ChannelObservation:
    """What one tensor showed, channel by channel.

    Attributes:
        low: Smallest value of each channel, [C].
        high: Largest, [C].
        values: A sample of the values, [N].
        channels: Where they were seen, int64 [N].
    """

    low: Tensor
    high: Tensor
    values: Tensor
    channels: Tensor

    def scaled(self, factor: Tensor | None) -> Observation:
        """Of the tensor whose channels are multiplied by a positive factor, [C]; None is 1."""
        if factor is None:
            return Observation(float(self.low.min()), float(self.high.max()), self.values)
        own = factor.to(self.low)
        return Observation(
            float((self.low * own).min()), float((self.high * own).max()), self.values * own[self.channels]
        )


def observe_channels(x: Tensor, axis: int, keep: int, generator: torch.Generator) -> ChannelObservation:
    """Look at one tensor, whose channels lie on ``axis``, and remember ``keep`` of its values."""
    axis %= x.ndim
    others = tuple(other for other in range(x.ndim) if other != axis)
    picks = torch.randint(x.numel(), (keep,), generator=generator)
    channels = torch.unravel_index(picks, x.shape)[axis]
    values = x.reshape(-1)[picks.to(x.device)]
    low, high, values = (part.float().cpu() for part in (x.amin(others), x.amax(others), values))
    return ChannelObservation(low, high, values, channels)


def observe(x: Tensor, keep: int, generator: torch.Generator) -> Observation:
    """Look at one tensor and remember ``keep`` of its values."""
    low, high = x.aminmax()
    picks = torch.randint(x.numel(), (keep,), generator=generator)
    return Observation(low.item(), high.item(), x.reshape(-1)[picks.to(x.device)].float().cpu())


def merge(parts: Sequence[Observation]) -> Observation:
    """One observation over several steps."""
    return Observation(
        min(part.low for part in parts), max(part.high for part in parts), torch.cat([part.values for part in parts])
    )


def merge_channels(parts: Sequence[ChannelObservation]) -> ChannelObservation:
    """One observation over several steps."""
    return ChannelObservation(
        torch.stack([part.low for part in parts]).amin(0),
        torch.stack([part.high for part in parts]).amax(0),
        torch.cat([part.values for part in parts]),
        torch.cat([part.channels for part in parts]),
    )


def activation_grid(observation: Observation, spec: QuantSpec, estimator: str) -> Grid:
    """A per-tensor grid; 0 is always inside its range, and the middle of a signed one.

    Args:
        estimator: A key of ``ESTIMATORS``.
    """
    return ESTIMATORS[estimator](observation, spec)


def min_max(observation: Observation, spec: QuantSpec) -> Grid:
    """The whole range that was observed."""
    return _grid_over(observation.low, observation.high, spec)


def percentile(observation: Observation, spec: QuantSpec) -> Grid:
    """The range less 0.01 % of the values at either end."""
    ends = torch.tensor([1 - PERCENTILE, PERCENTILE])
    low, high = (float(end) for end in observation.values.quantile(ends))
    return _grid_over(low, high, spec)


def least_squares(observation: Observation, spec: QuantSpec) -> Grid:
    """The range shrunk by (1 - 0.01 i), i < 80, with the i of least squared error."""
    return _least(_squared_error, observation, spec)


def least_divergence(observation: Observation, spec: QuantSpec) -> Grid:
    """The range shrunk likewise, with the i of least divergence between the histograms before and after."""
    return _least(_divergence, observation, spec)


ESTIMATORS: Mapping[str, Callable[[Observation, QuantSpec], Grid]] = {
    "mse": least_squares,
    "minmax": min_max,
    "kl": least_divergence,
    "percentile": percentile,
}
"""How a range becomes a scale, by the names that ``Method.estimator`` takes."""


def _grid_over(low: float, high: float, spec: QuantSpec) -> Grid:
    scales, zero_points = _grids_over(low, high, spec, torch.ones(1, dtype=torch.float64))
    return Grid(spec, scales[0], zero_points[0])


def _grids_over(low: float, high: float, spec: QuantSpec, shrink: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the range times each factor.

    Args:
        shrink: float64, [candidates].
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.signed:
        high = max(-low, high)
        low = high * spec.qmin / spec.qmax
    # What is always 0 has any grid, but a bias is counted in its steps.
    reach = high - low if high - low > SMALLEST else 1.0
    scale = (reach * shrink / (spec.qmax - spec.qmin)).float()  # [candidates]
    zero_point = (spec.qmin - torch.round(low * shrink.float() / scale)).clamp(spec.qmin, spec.qmax)  # [candidates]
    return scale, zero_point


def _least(cost: Cost, observation: Observation, spec: QuantSpec) -> Grid:
    shrink = 1 - 0.01 * torch.arange(SHRINK_STEPS, dtype=torch.float64)
    scale, zero_point = _grids_over(observation.low, observation.high, spec, shrink)
    costs = [cost(observation.values, s, z, spec) for s, z in zip(scale, zero_point, strict=True)]
    best = int(torch.stack(costs).argmin())
    return Grid(spec, scale[best], zero_point[best])


def _squared_error(values: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return (fake_quantize(values, scale, zero_point, spec) - values).square().mean()


def _divergence(values: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Of the histogram a grid can express from the one it is given (TensorRT's entropy calibration).

    What lies outside the grid counts at its ends, where the grid, which knows only the inside, does not expect it.
    """
    low, high = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    levels = spec.qmax - spec.qmin + 1
    inside = (values >= low) & (values <= high)
    bins = ((values.clamp(low, high) - low) / (high - low) * (BINS - 1)).round().long()
    given = torch.bincount(bins, minlength=BINS).double()
    known = torch.bincount(bins[inside], minlength=BINS).double()
    level = torch.arange(BINS) * levels // BINS
    occupied = (known > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, known)
    width = torch.zeros_like(mass).index_add_(0, level, occupied)
    expected = (mass / width.clamp_min(1))[level] * occupied
    p, q = given / given.sum(), expected / expected.sum().clamp_min(1e-12)
    return torch.xlogy(p, p / q.clamp_min(1e-12)).sum()
