"""Scales of weights, and rounding to nearest."""

import torch
from torch import Tensor

from tfmq_export.ptq.fake_quant import fake_quantize
from tfmq_export.spec import QuantSpec

SHRINK_STEPS = 80
NORM = 2.4


def search_weight_scale(weight: Tensor, spec: QuantSpec, candidates: int = SHRINK_STEPS) -> Tensor:
    """Scale per output channel of least ``mean |w - w^|^2.4`` (BRECQ's search; symmetric, zero point 0).

    The candidates shrink the channel's largest magnitude by (1 - 0.01 i).

    Args:
        weight: [out, ...].
        candidates: 1 takes the full range (min-max).
    Returns:
        Scales, [out]; 1 for a channel of zeros.
    """
    rows = weight.detach().reshape(len(weight), -1)  # [out, n]
    full = rows.abs().amax(1, keepdim=True) / spec.qmax  # [out, 1]
    full = torch.where(full > 0, full, torch.ones_like(full))
    zero = full.new_zeros(())
    best_error = torch.full_like(full, torch.inf)
    best = full
    for step in range(candidates):
        scale = full * (1 - 0.01 * step)
        error = (fake_quantize(rows, scale, zero, spec) - rows).abs().pow(NORM).mean(1, keepdim=True)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best[:, 0]


def per_output(scale: Tensor, weight: Tensor) -> Tensor:
    """Shape a scale per output channel so that it broadcasts against a weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def nearest_codes(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round to nearest; integers as float, shaped like ``weight``."""
    return (weight / per_output(scale, weight)).round().clamp(spec.qmin, spec.qmax)
