"""Learned activation steps (LSQ, section 2): the scales of a block's activations, tuned on its output.

Runs after the weights are rounded. Gradients are the straight-through ones; scales stay positive because
their logarithm is learned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tfmq_export.ptq.fake_quant import Grid, round_through


class LearnedGrid:
    """A grid whose scale and zero point are being learned.

    Args:
        grid: Where learning starts.
    """

    def __init__(self, grid: Grid) -> None:
        self._start = grid
        self.log_scale = grid.scale.log().clone().requires_grad_()
        self.zero_point = grid.zero_point.clone().requires_grad_()

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and the zero point before rounding."""
        return self.log_scale, self.zero_point

    def soft(self) -> Grid:
        """The grid with gradients."""
        spec = self._start.spec
        zero_point = round_through(self.zero_point.clamp(spec.qmin, spec.qmax))
        return replace(self._start, scale=self.log_scale.exp(), zero_point=zero_point)

    def hard(self) -> Grid:
        """The grid learning has reached."""
        soft = self.soft()
        return replace(soft, scale=soft.scale.detach().float(), zero_point=soft.zero_point.detach().round())


def learn_steps(
    loss: Callable[[Mapping[str, Grid]], Tensor], grids: Mapping[str, Grid], iterations: int, learning_rate: float
) -> dict[str, Grid]:
    """Tune the grids of one block.

    Args:
        loss: Of the block on a fresh batch, under these grids.
    """
    learned = {name: LearnedGrid(grid) for name, grid in grids.items()}
    scales = [grid.log_scale for grid in learned.values()]
    offsets = [grid.zero_point for grid in learned.values()]
    # An offset moves in units of codes, a scale in units of itself.
    groups: Sequence[dict[str, object]] = [
        {"params": scales, "lr": learning_rate},
        {"params": offsets, "lr": learning_rate * 50},
    ]
    optimizer = torch.optim.Adam(groups)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        value = loss({name: grid.soft() for name, grid in learned.items()})
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()
        cosine.step()
    return {name: grid.hard() for name, grid in learned.items()}
