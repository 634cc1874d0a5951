"""One choice per site, so that a sum of costs is least and sums of two others keep their bounds.

    min  sum_i cost_i(c_i)     subject to     sum_i size_i(c_i) <= S,   sum_i error_i(c_i) <= E

The size is kept exactly, by dynamic programming over it (a knapsack with one choice of each kind). The error joins the
cost with a factor, the least one with which its bound is kept (Lagrange). Errors of layers add up because they are
independent of each other; ``sensitivity.py`` measures them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKETS = 4000  # that the room to share is divided into
HALVINGS = 40  # of the interval that holds the factor of the error, in its logarithm
RANGE = 1e9  # of that factor, below and above what makes error and cost alike


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
    return _within(sites, size, lambda choice: choice.error)


def least_cost(sites: Sequence[Site], error: float, size: int | None) -> Picks | None:
    """The least cost with both bounds kept; None where no choice keeps them."""
    return _bounded(sites, error, size, lambda choice: choice.cost)


def least_size(sites: Sequence[Site], error: float) -> Picks | None:
    """The least size with at most this error; None where no choice has so little."""
    return _bounded(sites, error, None, lambda choice: float(choice.size))


def fits(sites: Sequence[Site], size: int) -> bool:
    """Whether the smallest choices are small enough."""
    return sum(min(choice.size for choice in site) for site in sites) <= size


def _bounded(sites: Sequence[Site], error: float, size: int | None, cost: Callable[[Choice], float]) -> Picks | None:
    """The least cost at the least factor of the error that keeps its bound."""
    best = least_error(sites, size)
    if total(sites, best).error > error:
        return None
    spread = [max(cost(x) for x in site) - min(cost(x) for x in site) for site in sites]
    alike = max(max(spread), 1e-12) / max(error, 1e-30)
    low, high = np.log(alike / RANGE), np.log(alike * RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        factor = float(np.exp(middle))
        picks = _within(sites, size, lambda choice, factor=factor: cost(choice) + factor * choice.error)  # type: ignore[misc]
        if total(sites, picks).error <= error:
            best, high = picks, middle
        else:
            low = middle
    return best


def _within(sites: Sequence[Site], size: int | None, cost: Callable[[Choice], float]) -> Picks:
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
