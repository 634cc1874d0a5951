"""The pair rule (``tfmq_export/recipe/pairs.py``) as a constraint of a weight's grid while its codes are chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_export.recipe.pairs import PAIR_SUM, partners


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which weights of an output channel must share ``PAIR_SUM``.

    Attributes:
        neighbours: Position of each weight's neighbour in the flattened row, int64 [n]; its own where it has none.
    """

    neighbours: Tensor

    @classmethod
    def of(cls, weight: Tensor, groups: int, codes: int) -> "Pairs | None":
        """The pairs of a layer's weight, [out, in / groups, ...]; None where kernels sum in 32 bits.

        Args:
            codes: Of the layer's input.
        """
        found = partners(weight.shape, groups, codes)
        return None if found is None else cls(torch.from_numpy(found).to(weight.device))

    def split(self, widths: Sequence[int]) -> "list[Pairs]":
        """The pairs of consecutive pieces of a row, none of which lies in two of them."""
        starts = [sum(widths[:index]) for index in range(len(widths))]
        parts = torch.split(self.neighbours, list(widths))
        return [Pairs(part - start) for part, start in zip(parts, starts, strict=True)]

    def sums(self, rows: Tensor) -> Tensor:
        """What each weight and its neighbour add up to where their signs agree, else 0; [out, n] like ``rows``."""
        other = rows[:, self.neighbours]
        return torch.where(rows * other > 0, (rows + other).abs(), torch.zeros_like(rows))

    def within(self, rows: Tensor) -> Tensor:
        """Real weights that keep the rule; see ``within``.

        Args:
            rows: In steps of the grid, [out, n].
        """
        return within(rows, self.sums(rows))

    def settle(self, codes: Tensor) -> Tensor:
        """Integers that keep the rule: where rounding broke a pair, its second weight gives way.

        Args:
            codes: [out, n]; what they were rounded from keeps the rule.
        """
        here = torch.arange(len(self.neighbours), device=codes.device)
        excess = (self.sums(codes) - PAIR_SUM).clamp_min(0)
        # A weight that is its own neighbour exceeds by twice what it is too large.
        share = torch.where(self.neighbours == here, 0.5, torch.where(self.neighbours < here, 1.0, 0.0))
        return shrink(codes, (excess * share).ceil())


def within(rows: Tensor, sums: Tensor) -> Tensor:
    """Real weights that keep the rule, the nearest inside the grid: what a pair has too much, both give up alike.

    Args:
        rows: In steps of the grid, [out, n].
        sums: Of each weight and its neighbour, in the same steps.
    """
    return shrink(rows, (sums - PAIR_SUM).clamp_min(0) / 2)


def shrink(values: Tensor, by: Tensor) -> Tensor:
    """Values moved towards 0, not beyond it."""
    return values.sign() * (values.abs() - by).clamp_min(0)
