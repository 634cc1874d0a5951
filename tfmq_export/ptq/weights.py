"""Scales of weights, and rounding to nearest."""

import torch
from torch import Tensor

from tfmq_export.ptq.pairs import Pairs, within
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM

SHRINK_STEPS = 80
NORM = 2.4
IN_CACHE = 1 << 17  # weights of a few channels, whose candidates are tried while they are in a cache


def search_weight_scale(
    weight: Tensor, spec: QuantSpec, candidates: int = SHRINK_STEPS, pairs: Pairs | None = None
) -> Tensor:
    """Scale per output channel of least ``mean |w - w^|^2.4`` (BRECQ's search; symmetric, zero point 0).

    The candidates shrink the scale that clips nothing, neither a weight nor a pair, by (1 - 0.01 i). They end where
    what the largest weight alone loses is more than the least error so far: no smaller scale can be better.

    Args:
        weight: [out, ...].
        candidates: 1 takes the full range (min-max).
        pairs: What the codes must keep.
    Returns:
        Scales, [out]. A channel of zeros has the smallest of the others, in whose steps its bias is counted; 1 where
        all are zero.
    """
    rows = weight.detach().reshape(len(weight), -1)  # [out, n]
    few = torch.split(rows, max(1, IN_CACHE // rows.shape[1]))
    scales = torch.cat([_search(part, spec, candidates, pairs) for part in few])
    silent = ~rows.any(1)
    if silent.all():
        return torch.ones_like(scales)
    return torch.where(silent, scales[~silent].min(), scales)


def _search(rows: Tensor, spec: QuantSpec, candidates: int, pairs: Pairs | None) -> Tensor:
    full = full_scale(rows, spec, pairs)
    full = torch.where(full > 0, full, torch.ones_like(full))
    best_error = torch.full_like(full, torch.inf)
    best = full
    sums = None if pairs is None else pairs.sums(rows)
    for step in range(candidates):
        scale = full * (1 - 0.01 * step)
        if bool((_least_error(full, scale, rows.shape[1], spec) > best_error).all()):
            break
        steps = rows / scale
        kept = steps if sums is None else within(steps, sums / scale)
        error = (kept.round_().clamp_(spec.qmin, spec.qmax) * scale - rows).abs().pow(NORM).mean(1, keepdim=True)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best[:, 0]


def _least_error(full: Tensor, scale: Tensor, count: int, spec: QuantSpec) -> Tensor:
    """What the weight or pair that takes all of ``full`` adds to the error at a smaller scale, at least.

    A pair may share its loss, and rounding may give half a step back.
    """
    lost = min(spec.qmax, PAIR_SUM) * (full - scale) / 2 - scale / 2
    return lost.clamp_min(0).pow(NORM) / count


def per_output(scale: Tensor, weight: Tensor) -> Tensor:
    """Shape a scale per output channel so that it broadcasts against a weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def full_scale(rows: Tensor, spec: QuantSpec, pairs: Pairs | None = None) -> Tensor:
    """The least scale that clips neither a weight nor a pair, [out, 1].

    Args:
        rows: [out, n].
    """
    full = rows.abs().amax(1, keepdim=True) / spec.qmax
    return full if pairs is None else torch.maximum(full, pairs.sums(rows).amax(1, keepdim=True) / PAIR_SUM)


def nearest_codes(weight: Tensor, scale: Tensor, spec: QuantSpec, pairs: Pairs | None = None) -> Tensor:
    """Round to nearest; integers as float, shaped like ``weight``."""
    steps = weight / per_output(scale, weight)
    if pairs is None:
        return steps.round().clamp(spec.qmin, spec.qmax)
    rows = pairs.within(steps.reshape(len(steps), -1))
    return pairs.settle(rows.round().clamp(spec.qmin, spec.qmax)).reshape(weight.shape)
