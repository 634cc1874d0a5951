"""Block reconstruction (BRECQ, section 3.2) with learned rounding (AdaRound, section 3).

All layers of a block learn together how to round, so that the block's output comes back:

    || B(x) - B^(x^) ||^2 + 0.01 * sum(1 - |2 h - 1| ** beta)

``x`` is the block's full-precision input, ``x^`` what the network quantized so far makes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tfmq_export.progress import Step
from tfmq_export.ptq.draft import Draft
from tfmq_export.ptq.effort import RoundingSchedule
from tfmq_export.ptq.learning import Batch, GradientStep, adam
from tfmq_export.ptq.rounding import (
    beta_at,
    hard_codes,
    rounding_logits,
    rounding_regularizer,
    soft_weight,
    undecided,
)
from tfmq_export.ptq.weights import per_output

REGULARIZER_WEIGHT = 0.01
CHECK_EVERY = 25

Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]
"""Reconstruction loss of a batch, with these weights by layer."""


def learn_rounding(
    drafts: Sequence[Draft], draw: Callable[[], Batch], loss: Loss, schedule: RoundingSchedule, progress: Step
) -> tuple[Draft, ...]:
    """Decide the rounding of all layers of a block.

    Args:
        drafts: With their scales; codes are the result.
        draw: A fresh batch.
        loss: Mean squared error of the block's output, summed over channels.
    """
    by_name = {draft.op.name: draft for draft in drafts}
    floors, scales, logits = {}, {}, {}
    for name, draft in by_name.items():
        assert draft.scale is not None
        scales[name] = per_output(draft.scale, draft.weight)
        floors[name] = (draft.weight / scales[name]).floor()
        logits[name] = rounding_logits(draft.weight, scales[name]).requires_grad_()
    specs = {name: draft.weight_spec for name, draft in by_name.items()}
    beta = drafts[0].plain.new_zeros(())  # a tensor, because a recorded step reads it anew

    def reconstruction(batch: Batch) -> Tensor:
        weights = {name: soft_weight(floors[name], scales[name], logits[name], spec) for name, spec in specs.items()}
        return loss(weights, batch)

    def regularized(batch: Batch) -> Tensor:
        return reconstruction(batch) + REGULARIZER_WEIGHT * sum(rounding_regularizer(x, beta) for x in logits.values())

    optimizers = [adam(logits.values(), schedule.learning_rate)]
    fit, settle = (GradientStep(draw, goal, optimizers) for goal in (reconstruction, regularized))
    for iteration in range(schedule.iterations):
        now = beta_at(iteration / schedule.iterations)
        if now is None:
            fit()
        else:
            beta.fill_(now)
            settle()
        progress(iteration + 1, schedule.iterations)
        if now is not None and iteration % CHECK_EVERY == 0:
            with torch.no_grad():
                if all(undecided(x) == 0 for x in logits.values()):
                    break  # every weight is decided; nothing can change any more
    return tuple(
        replace(draft, codes=hard_codes(floors[name], logits[name].detach(), draft.weight_spec))
        for name, draft in by_name.items()
    )
