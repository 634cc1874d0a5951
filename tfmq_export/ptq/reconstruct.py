"""Block reconstruction (BRECQ, section 3.2) with learned rounding (AdaRound, section 3).

All layers of a block learn together how to round, so that the block's output comes back:

    || B(x) - B^(x^) ||^2 + 0.01 * sum(1 - |2 h - 1| ** beta)

``x`` is the block's full-precision input, ``x^`` what the network quantized so far makes of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tfmq_export.progress import Step
from tfmq_export.ptq.rounding import (
    beta_at,
    hard_codes,
    rounding_logits,
    rounding_regularizer,
    sides,
    soft_weight,
    undecided,
)
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.walk.effort import RoundingSchedule
from tfmq_export.ptq.walk.learning import Batch, Draw, GradientStep, adam
from tfmq_export.ptq.weights import per_output

REGULARIZER_WEIGHT = 0.01
CHECK_EVERY = 25

Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]
"""Reconstruction loss of a batch, with these weights by layer."""


def learn_rounding(
    drafts: Sequence[Draft],
    draw: Draw,
    loss: Loss,
    schedule: RoundingSchedule,
    progress: Step,
    pull: float = 1.0,
) -> tuple[Draft, ...]:
    """Decide the rounding of all layers of a block.

    Args:
        drafts: With their scales, and the codes to start from.
        loss: Mean squared error of the block's output, summed over channels.
        pull: Where the soft weights start, from 0 at those codes to 1 at the float weights as AdaRound does.
    """
    # All weights of the block in one row: a step passes over them once, however many layers there are.
    scales = [per_output(_known(draft.scale), draft.weight) for draft in drafts]
    starts = [_known(draft.codes) for draft in drafts]
    codes = [
        sides(draft.weight, scale, start, draft.weight_spec, draft.pairs)
        for draft, scale, start in zip(drafts, scales, starts, strict=True)
    ]
    low, high = (
        _row(side * scale for side, scale in zip(part, scales, strict=True)) for part in zip(*codes, strict=True)
    )
    logits = _row(
        rounding_logits(draft.weight, scale, start, pull)
        for draft, scale, start in zip(drafts, scales, starts, strict=True)
    )
    logits.requires_grad_()
    beta = low.new_zeros(())  # a tensor, because a recorded step reads it anew

    def reconstruction(batch: Batch) -> Tensor:
        return loss(_by_layer(soft_weight(low, high, logits), drafts), batch)

    def regularized(batch: Batch) -> Tensor:
        return reconstruction(batch) + REGULARIZER_WEIGHT * rounding_regularizer(logits, beta)

    optimizers = [adam([logits], schedule.learning_rate)]
    fit, settle = (GradientStep(draw, goal, optimizers) for goal in (reconstruction, regularized))
    for iteration in range(schedule.iterations):
        now = beta_at(iteration / schedule.iterations)
        if now is None:
            fit()
        else:
            beta.fill_(now)
            settle()
        progress(iteration + 1, schedule.iterations)
        if now is not None and iteration % CHECK_EVERY == 0 and undecided(logits.detach()) == 0:
            break  # every weight is decided; nothing can change any more
    decided = _by_layer(logits.detach(), drafts)
    return tuple(
        replace(draft, codes=hard_codes(*each, decided[draft.op.name]))
        for draft, each in zip(drafts, codes, strict=True)
    )


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _row(weights: Iterable[Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights])


def _by_layer(row: Tensor, drafts: Sequence[Draft]) -> dict[str, Tensor]:
    parts = torch.split(row, [draft.plain.numel() for draft in drafts])
    return {draft.op.name: part.view_as(draft.plain) for draft, part in zip(drafts, parts, strict=True)}
