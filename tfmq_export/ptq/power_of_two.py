"""Power-of-two scaling, PTS, with voting (DMQ, section 3.4).

Inputs of skip layers see unnormalised features, where a few channels are many times larger than the
rest. Such a layer quantizes channel k with ``scale * 2^d_k``, d in {-3..0}; the shift is exact and belongs
to the integers of the weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_export.recipe.grid import QuantSpec

EXPONENTS = (-3, -2, -1, 0)
QUORUM = 0.85  # kappa


def channel_errors(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, exponents: Sequence[int] = EXPONENTS
) -> Tensor:
    """Squared error of each sample and channel under each exponent, [E, N, C].

    Args:
        x: [N, C, *spatial].
        scale: Full-range scale of the layer; with ``zero_point`` shared by all channels.
    """
    errors = []
    for exponent in exponents:
        step = scale * 2.0**exponent
        codes = ((x / step).round() + zero_point).clamp(spec.qmin, spec.qmax) - zero_point
        errors.append((codes * step - x).square().flatten(2).mean(2))
    return torch.stack(errors)


def vote_exponents(errors: Tensor, exponents: Sequence[int] = EXPONENTS, quorum: float = QUORUM) -> Tensor:
    """Each sample votes for the exponent of least error; a winner below the quorum leaves the channel unscaled.

    Args:
        errors: [E, N, C].
    Returns:
        Exponents, int8 [C].
    """
    candidates = torch.tensor(exponents, dtype=torch.int8)
    ballots = _least(errors)  # [N, C]
    winner = ballots.mode(0).values  # [C]
    share = (ballots == winner).double().mean(0)
    return torch.where(share >= quorum, candidates[winner], torch.zeros_like(candidates[winner]))


def least_error_exponents(errors: Tensor, exponents: Sequence[int] = EXPONENTS) -> Tensor:
    """The exponent of least total error, without a vote; the ablation's baseline. int8 [C]."""
    return torch.tensor(exponents, dtype=torch.int8)[_least(errors.mean(1))]


def _least(errors: Tensor) -> Tensor:
    """Index of the least error; of equal ones the last, which scales least."""
    return (len(errors) - 1 - errors.flip(0).argmin(0)).cpu()
