"""From observed activations to a grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.fake_quant import fake_quantize
from tfmq_export.spec import QParams, QuantSpec

SHRINK_STEPS = 80


class Estimator(StrEnum):
    """How a range becomes a scale."""

    MIN_MAX = "minmax"
    MSE = "mse"


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


def observe(x: Tensor, keep: int, generator: torch.Generator) -> Observation:
    """Look at one tensor and remember ``keep`` of its values."""
    low, high = x.aminmax()
    picks = torch.randint(x.numel(), (keep,), generator=generator)
    return Observation(low.item(), high.item(), x.reshape(-1)[picks].clone())


def merge(parts: Sequence[Observation]) -> Observation:
    """One observation over several steps."""
    return Observation(
        min(part.low for part in parts), max(part.high for part in parts), torch.cat([part.values for part in parts])
    )


def activation_grid(observation: Observation, bits: int, estimator: Estimator) -> QParams:
    """An unsigned per-tensor grid; 0 is always inside its range.

    ``MSE`` shrinks the observed range by (1 - 0.01 i), i < 80, and keeps the i of least squared error.
    """
    spec = QuantSpec(bits, signed=False)
    low, high = min(observation.low, 0.0), max(observation.high, 0.0)
    shrink = torch.ones(1, dtype=torch.float64)
    if estimator is Estimator.MSE:
        shrink = 1 - 0.01 * torch.arange(SHRINK_STEPS, dtype=torch.float64)
    scale = (max(high - low, 1e-8) * shrink / (spec.qmax - spec.qmin)).float()  # [candidates]
    zero_point = (spec.qmin - torch.round(low * shrink.float() / scale)).clamp(spec.qmin, spec.qmax)  # [candidates]
    errors = [
        (fake_quantize(observation.values, s, z, spec) - observation.values).square().mean()
        for s, z in zip(scale, zero_point, strict=True)
    ]
    best = int(torch.stack(errors).argmin())
    return QParams(spec, scale[best].numpy(), zero_point[best].to(torch.int32).numpy())
