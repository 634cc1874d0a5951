"""Learned activation steps (LSQ, section 2): the scales of a block's activations, tuned on its output.

Runs after the weights are rounded. Gradients are the straight-through ones; scales stay positive because
their logarithm is learned.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from tfmq_export.ptq.fake_quant import Grid, round_through
from tfmq_export.ptq.walk.learning import Batch, Draw, GradientStep, adam, anneal

OFFSET_RATE = 50  # times the scale's: an offset moves in units of codes, a scale in units of itself


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
    draw: Draw,
    loss: Callable[[Mapping[str, Grid], Batch], Tensor],
    grids: Mapping[str, Grid],
    iterations: int,
    learning_rate: float,
) -> dict[str, Grid]:
    """Tune the grids of one block.

    Args:
        loss: Of the block on a batch, under these grids.
    """
    learned = {name: LearnedGrid(grid) for name, grid in grids.items()}
    scales = adam((grid.log_scale for grid in learned.values()), learning_rate)
    offsets = adam((grid.zero_point for grid in learned.values()), OFFSET_RATE * learning_rate)
    step = GradientStep(
        draw, lambda batch: loss({name: x.soft() for name, x in learned.items()}, batch), [scales, offsets]
    )
    for iteration in range(iterations):
        anneal(scales, learning_rate, iteration / iterations)
        anneal(offsets, OFFSET_RATE * learning_rate, iteration / iterations)
        step()
    return {name: grid.hard() for name, grid in learned.items()}
