"""Rounding weights to a grid per output channel."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.ptq.fake_quant import fake_quantize
from tfmq_export.spec import QParams, QuantSpec

SHRINK_STEPS = 80
NORM = 2.4


def search_weight_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scale per output channel of least ``mean |w - w^|^2.4`` (BRECQ's search; symmetric, zero point 0).

    The candidates shrink the channel's largest magnitude by (1 - 0.01 i), i < 80.

    Args:
        weight: [out, ...].
    Returns:
        Scales, [out]; 1 for a channel of zeros.
    """
    rows = weight.detach().reshape(len(weight), -1)  # [out, n]
    full = rows.abs().amax(1, keepdim=True) / spec.qmax  # [out, 1]
    full = torch.where(full > 0, full, torch.ones_like(full))
    zero = full.new_zeros(())
    best_error = torch.full_like(full, torch.inf)
    best = full
    for step in range(SHRINK_STEPS):
        scale = full * (1 - 0.01 * step)
        error = (fake_quantize(rows, scale, zero, spec) - rows).abs().pow(NORM).mean(1, keepdim=True)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best[:, 0]


def quantize_weight(weight: Tensor, bits: int) -> tuple[QParams, NDArray[np.int8]]:
    """Round to nearest on the searched grid.

    Returns:
        The grid (axis 0) and the int8 codes, shaped like ``weight``.
    """
    spec = QuantSpec(bits, signed=True, axis=0)
    scale = search_weight_scale(weight, spec)
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))
    codes = (weight / shaped).round().clamp(spec.qmin, spec.qmax)
    grid = QParams(spec, scale.float().numpy(), np.zeros(len(scale), np.int32))
    return grid, codes.to(torch.int8).numpy()
