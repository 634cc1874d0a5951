"""From what was measured and what is wanted to the bits of every layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.recipe.recipe import TableType
from tfmq_export.report.numbers import size as in_words
from tfmq_export.search.choices import Choice, Picks, Site, fits, least_cost, least_error, least_size, total
from tfmq_export.search.sites import LayerSite, widths_of
from tfmq_export.search.survey import Survey

AIM = 0.3  # dB above the goal: an expectation is off by about so much, and a miss costs another compile


@dataclass(frozen=True, slots=True)
class Goal:
    """What the user wants; at least one of both.

    Attributes:
        psnr: Of the images, dB.
        size: Of the graphs, bytes.
    """

    psnr: float | None
    size: int | None

    def describe(self) -> str:
        """In words."""
        psnr = [] if self.psnr is None else [f"at least {self.psnr:g} dB"]
        return " and ".join(psnr + ([] if self.size is None else [f"at most {in_words(self.size)}"]))


@dataclass(frozen=True, slots=True)
class Misses:
    """How far compiled bundles were from what was expected of them.

    Attributes:
        psnr: Measured less expected, dB.
        size: The same in bytes.
    """

    psnr: float = 0.0
    size: int = 0


@dataclass(frozen=True, slots=True)
class BitsPlan:
    """A choice for every layer.

    Attributes:
        widths: By layer, with the reason.
        tables: What rows of temporal tables are stored in.
        psnr: To be expected, dB.
        size: To be expected, bytes.
        counts: Layers by what they take, such as "8 bits", "4 bits in floating point".
    """

    widths: Mapping[str, Widths]
    tables: TableType
    psnr: float
    size: int
    counts: Mapping[str, int]

    def describe(self) -> str:
        """In words."""
        layers = ", ".join(f"{n} layer{'s' if n != 1 else ''} in {what}" for what, n in self.counts.items())
        return f"{layers}, {self.tables} tables; {self.psnr:.1f} dB and {in_words(self.size)} expected"


def plan_bits(survey: Survey, goal: Goal, pins: Mapping[str, Widths], misses: Misses = Misses()) -> BitsPlan:  # frozen
    """The bits that meet a goal; of a goal out of reach, what comes nearest in PSNR.

    With both bounds, as little work in floating point as they allow. With a PSNR alone, the smallest file; with a size
    alone, the best images: both in integers, where that is enough.

    Raises:
        ConfigError: nothing is so small.
    """
    kinds = list(survey.tables)
    sites = [*survey.sites]
    everything: list[Site] = [tuple(survey.tables.values()), *(site.choices for site in sites)]
    integers: list[Site] = [everything[0], *(site.in_integers().choices for site in sites)]
    room = None if goal.size is None else goal.size - survey.fixed - misses.size
    if room is not None and not fits(everything, room):
        least = sum(min(choice.size for choice in site) for site in everything) + survey.fixed + misses.size
        raise ConfigError(f"--max-size {in_words(goal.size or 0)}: the smallest choice of bits takes {in_words(least)}")
    limit = None if goal.psnr is None else survey.decibels.error(goal.psnr + AIM - misses.psnr)
    all_integer = True
    if limit is None:
        all_integer = room is None or fits(integers, room)
        picks = least_error(integers if all_integer else everything, room)
    elif room is not None:
        all_integer = False
        picks = least_cost(everything, limit, room) or least_error(everything, room)
    else:
        found = least_size(integers, limit)
        all_integer = found is not None
        picks = found or least_cost(_weighing_both(everything), limit, None) or least_error(everything, None)
    shown = [site.in_integers() for site in sites] if all_integer else sites
    return _plan(survey, shown, kinds, picks, pins, misses)


def _weighing_both(sites: list[Site]) -> list[Site]:
    """Where integers are not enough: a share of the bytes costs as much as the same share of the work."""
    largest = sum(max(choice.size for choice in site) for site in sites)
    return [tuple(replace(x, cost=x.cost + x.size / largest) for x in site) for site in sites]


def _plan(
    survey: Survey,
    sites: list[LayerSite],
    kinds: list[TableType],
    picks: Picks,
    pins: Mapping[str, Widths],
    misses: Misses,
) -> BitsPlan:
    rows = list(survey.tables.values())[picks[0]]
    layers: Choice = total([site.choices for site in sites], picks[1:])
    widths = widths_of(sites, picks[1:], pins)
    counts: dict[str, int] = {}
    for each in sorted(widths.values(), key=lambda x: (x.inputs == FLOAT, -(x.weights or 0))):
        what = f"{each.weights} bits" + (" and floating point" if each.inputs == FLOAT else "")
        what = "floating point" if each.is_float else what
        counts[what] = counts.get(what, 0) + 1
    return BitsPlan(
        widths,
        kinds[picks[0]],
        survey.decibels.of(layers.error + rows.error) + misses.psnr,
        layers.size + rows.size + survey.fixed + misses.size,
        counts,
    )
