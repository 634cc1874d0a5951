"""One choice per site, so that a sum of costs is least and sums of two others keep their bounds.

    min  sum_i cost_i(c_i)     subject to     sum_i size_i(c_i) <= S,   sum_i error_i(c_i) <= E

or the least error where the cost has a bound. The size is kept exactly, by dynamic programming over it (a knapsack with
one choice of each kind). The other bound joins what is least with a factor, the least one that keeps it (Lagrange).
Errors of layers add up because they are independent of each other; ``sensitivity.py`` measures them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKETS = 4000  # that the room to share is divided into
HALVINGS = 40  # of the interval that holds the factor of the bound, in its logarithm
RANGE = 1e9  # of that factor, below and above what makes both alike


@dataclass(frozen=True, slots=True)
class Choice:
    """What one site may take.

    Attributes:
        error: That it alone adds to the prediction: squared, weighted over the timesteps.
        size: Bytes in the file.
        cost: Of running it, in any unit; 0 for integer kernels.
    """

    error: float
    size: int
    cost: float = 0.0


Site = Sequence[Choice]
Measure = Callable[[Choice], float]
Picks = tuple[int, ...]
"""Position of the choice taken at each site."""


def total(sites: Sequence[Site], picks: Picks) -> Choice:
    """What the choices taken sum up to."""
    taken = [site[pick] for site, pick in zip(sites, picks, strict=True)]
    return Choice(sum(x.error for x in taken), sum(x.size for x in taken), sum(x.cost for x in taken))


def least_error(sites: Sequence[Site], size: int | None) -> Picks:
    """The least error in so many bytes.

    Args:
        size: None for any.
    """
    return _within(sites, size, _error)


def least_error_at(sites: Sequence[Site], cost: float, size: int | None) -> Picks | None:
    """The least error with both bounds kept; None where no choice keeps them.

    Args:
        cost: Infinite for any.
    """
    return _bounded(sites, size, _error, _cost, cost) if math.isfinite(cost) else least_error(sites, size)


def least_cost(sites: Sequence[Site], error: float, size: int | None) -> Picks | None:
    """The least cost with both bounds kept; None where no choice keeps them."""
    return _bounded(sites, size, _cost, _error, error)


def least_size(sites: Sequence[Site], error: float) -> Picks | None:
    """The least size with at most this error; None where no choice has so little."""
    return _bounded(sites, None, lambda choice: float(choice.size), _error, error)


def fits(sites: Sequence[Site], size: int) -> bool:
    """Whether the smallest choices are small enough."""
    return sum(min(choice.size for choice in site) for site in sites) <= size


def _error(choice: Choice) -> float:
    return choice.error


def _cost(choice: Choice) -> float:
    return choice.cost


def _bounded(sites: Sequence[Site], size: int | None, least: Measure, held: Measure, bound: float) -> Picks | None:
    """The least of one measure, at the least factor of the other that keeps its bound."""

    def kept(picks: Picks) -> bool:
        return sum(held(site[pick]) for site, pick in zip(sites, picks, strict=True)) <= bound

    best = _within(sites, size, held)
    if not kept(best):
        return None
    spread = [max(least(x) for x in site) - min(least(x) for x in site) for site in sites]
    alike = max(max(spread), 1e-12) / max(bound, 1e-30)
    low, high = np.log(alike / RANGE), np.log(alike * RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        factor = float(np.exp(middle))
        picks = _within(sites, size, lambda choice, factor=factor: least(choice) + factor * held(choice))  # type: ignore[misc]
        if kept(picks):
            best, high = picks, middle
        else:
            low = middle
    return best


def _within(sites: Sequence[Site], size: int | None, cost: Measure) -> Picks:
    """The choices of least cost in so many bytes; sizes are rounded up to buckets, so the bound holds."""
    if size is None:
        return tuple(int(np.argmin([cost(choice) for choice in site])) for site in sites)
    least = [min(choice.size for choice in site) for site in sites]
    room = size - sum(least)
    if room < 0:
        return tuple(int(np.argmin([choice.size for choice in site])) for site in sites)
    step = max(1, -(-room // BUCKETS))
    spent = np.zeros(room // step + 1)  # least cost of the sites so far, by buckets spent at most
    taken: list[NDArray[np.int64]] = []
    for site, smallest in zip(sites, least, strict=True):
        rows = np.full((len(site), len(spent)), np.inf)
        for row, choice in enumerate(site):
            extra = -(-(choice.size - smallest) // step)
            if extra < len(spent):
                rows[row, extra:] = spent[: len(spent) - extra] + cost(choice)
        taken.append(rows.argmin(0))
        spent = rows.min(0)
    picks, left = [], len(spent) - 1
    for site, smallest, by_room in zip(reversed(sites), reversed(least), reversed(taken), strict=True):
        pick = int(by_room[left])
        picks.append(pick)
        left -= -(-(site[pick].size - smallest) // step)
    return tuple(reversed(picks))
