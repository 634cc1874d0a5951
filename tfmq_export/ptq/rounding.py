"""Rounding that can learn (AdaRound, section 3): up or down for every weight, decided by gradient descent.

    W_q = s * (down + (up - down) h(a))        h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1)

From nearest codes, down and up are floor and ceil of ``W / s`` inside the grid and ``h`` starts at its fractional part,
so that the soft weight is the float weight. From better codes it starts on the way to it. A regulariser drives ``h`` to
0 or 1; ``a >= 0`` decides what is left between.
"""

import torch
from torch import Tensor

from tfmq_export.ptq.pairs import Pairs
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
UNDECIDED = 0.5 - 1e-6  # of a step from a code: just short of the next one's half
WARM_UP = 0.2  # share of the iterations without regulariser
BETA_START, BETA_END = 20.0, 2.0


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """The share of a step by which each weight is rounded up, in 0..1."""
    return ((STRETCH_HIGH - STRETCH_LOW) * logits.sigmoid() + STRETCH_LOW).clamp(0, 1)


def sides(
    weight: Tensor, scale: Tensor, codes: Tensor, spec: QuantSpec, pairs: Pairs | None = None
) -> tuple[Tensor, Tensor]:
    """The two codes a weight may get, down and up: the one it has and the next towards its value.

    From nearest codes these are floor and ceil; beyond the grid both are its edge. In a pair that both moves would
    break nothing moves: then whatever is decided, the pair keeps its rule.

    Args:
        scale: Broadcasts against ``weight``.
    """
    down = torch.where(weight / scale >= codes, codes, codes - 1)
    low, high = down.clamp(spec.qmin, spec.qmax), (down + 1).clamp(spec.qmin, spec.qmax)
    if pairs is None:
        return low, high
    broken = [pairs.sums(side.reshape(len(side), -1)).view_as(side) > PAIR_SUM for side in (low, high)]
    stays = broken[0] | broken[1]
    return torch.where(stays, codes, low), torch.where(stays, codes, high)


def rounding_logits(weight: Tensor, scale: Tensor, codes: Tensor, pull: float = 1.0) -> Tensor:
    """Logits that start the soft weight between its code and its value; as they are, they decide for the code.

    Args:
        scale: Broadcasts against ``weight``.
        pull: 0 starts at the code, 1 at the value, as far as the code keeps the decision.
    """
    gap = weight / scale - codes
    moved = (pull * gap).clamp(-UNDECIDED, UNDECIDED)
    h = torch.where(gap >= 0, moved, 1 + moved)
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (h - STRETCH_LOW) - 1)


def soft_weight(low: Tensor, high: Tensor, logits: Tensor) -> Tensor:
    """The weight while its rounding is being learned, from ``low`` where ``h`` is 0 to ``high`` where it is 1."""
    return torch.lerp(low, high, rectified_sigmoid(logits))


def hard_codes(down: Tensor, up: Tensor, logits: Tensor) -> Tensor:
    """The integers the logits decided on, float."""
    return torch.where(logits >= 0, up, down)


def undecided(logits: Tensor) -> Tensor:
    """Share of the weights whose ``h`` is neither 0 nor 1."""
    h = rectified_sigmoid(logits)
    return ((h > 0) & (h < 1)).float().mean()


def rounding_regularizer(logits: Tensor, beta: float | Tensor) -> Tensor:
    """``sum(1 - |2 h - 1| ** beta)``: 0 where every weight is decided."""
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()


def beta_at(progress: float) -> float | None:
    """Exponent of the regulariser; None while it is off.

    Args:
        progress: Share of the iterations done, in 0..1.
    """
    if progress < WARM_UP:
        return None
    return BETA_START + (BETA_END - BETA_START) * (progress - WARM_UP) / (1 - WARM_UP)
