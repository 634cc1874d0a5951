"""From what was measured and what is wanted to the bits of every layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.recipe.recipe import TableType
from tfmq_export.report.numbers import milliseconds as in_ms
from tfmq_export.report.numbers import size as in_words
from tfmq_export.search.choices import (
    Choice,
    Picks,
    Site,
    fits,
    least_cost,
    least_error,
    least_error_at,
    least_size,
    total,
)
from tfmq_export.search.sites import LayerSite, widths_of
from tfmq_export.search.survey import Survey

AIM = 0.3  # dB above the goal: an expectation is off by about so much, and a miss costs another compile


@dataclass(frozen=True, slots=True)
class Goal:
    """What the user wants; at least one of the three.

    Attributes:
        psnr: Of the images, dB.
        size: Of the graphs, bytes.
        seconds: Of a call with one sample, on this machine.
    """

    psnr: float | None
    size: int | None
    seconds: float | None = None

    def describe(self) -> str:
        """In words."""
        psnr = [] if self.psnr is None else [f"at least {self.psnr:g} dB"]
        size = [] if self.size is None else [f"at most {in_words(self.size)}"]
        return " and ".join(psnr + size + ([] if self.seconds is None else [f"at most {in_ms(self.seconds)} a call"]))


@dataclass(frozen=True, slots=True)
class Misses:
    """How far compiled bundles were from what was expected of them.

    Attributes:
        psnr: Measured less expected, dB.
        size: The same in bytes.
        seconds: The same in seconds of a call.
    """

    psnr: float = 0.0
    size: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BitsPlan:
    """A choice for every layer.

    Attributes:
        widths: By layer, with the reason.
        tables: What rows of temporal tables are stored in.
        psnr: To be expected, dB.
        size: To be expected, bytes.
        counts: Layers by what they take, such as "8 bits", "4 bits in floating point".
        seconds: Of a call, to be expected; None where no time was asked for.
    """

    widths: Mapping[str, Widths]
    tables: TableType
    psnr: float
    size: int
    counts: Mapping[str, int]
    seconds: float | None = None

    def describe(self) -> str:
        """In words."""
        layers = ", ".join(f"{n} layer{'s' if n != 1 else ''} in {what}" for what, n in self.counts.items())
        time = "" if self.seconds is None else f", {in_ms(self.seconds)} a call"
        return f"{layers}, {self.tables} tables; {self.psnr:.1f} dB and {in_words(self.size)}{time} expected"


def plan_bits(survey: Survey, goal: Goal, pins: Mapping[str, Widths], misses: Misses = Misses()) -> BitsPlan:  # frozen
    """The bits that meet a goal; of a goal out of reach, what comes nearest in PSNR.

    With a PSNR and a size, as little work in floating point as they allow. With a PSNR alone, the smallest file; with a
    size alone, the best images: both in integers, where that is enough. A time allows the work that fits into it.

    Raises:
        ConfigError: nothing is so small, or so fast.
    """
    kinds = list(survey.tables)
    everything: list[Site] = [tuple(survey.tables.values()), *(site.choices for site in survey.sites)]
    integers: list[Site] = [everything[0], *(site.in_integers().choices for site in survey.sites)]
    room = None if goal.size is None else goal.size - survey.fixed - misses.size
    if room is not None and not fits(everything, room):
        least = sum(min(choice.size for choice in site) for site in everything) + survey.fixed + misses.size
        raise ConfigError(f"--max-size {in_words(goal.size or 0)}: the smallest choice of bits takes {in_words(least)}")
    limit = None if goal.psnr is None else survey.decibels.error(goal.psnr + AIM - misses.psnr)
    work = _work(survey, goal, misses)
    picks = _in_integers(integers, room, limit) if work is None or limit is not None else None
    shown = [site.in_integers() for site in survey.sites]
    if picks is None:
        picks, shown = _of_everything(everything, room, limit, work), list(survey.sites)
    if picks is None:
        raise ConfigError(f"no choice of bits has {goal.describe()}: allow more of one")
    return _plan(survey, shown, kinds, picks, pins, misses)


def _work(survey: Survey, goal: Goal, misses: Misses) -> float | None:
    """The most work in floating point that a goal allows; None where it names no time."""
    if goal.seconds is None or survey.latency is None:
        return None
    work = survey.latency.work(goal.seconds - misses.seconds)
    if work is None:
        least = in_ms(survey.latency.base + misses.seconds)
        raise ConfigError(
            f"--max-latency {in_ms(goal.seconds)}: a call with every layer in integers takes {least} here"
        )
    return work


def _in_integers(integers: list[Site], room: int | None, limit: float | None) -> Picks | None:
    """One bound alone, where integers are enough for it."""
    if limit is None:
        return least_error(integers, room) if room is None or fits(integers, room) else None
    return least_size(integers, limit) if room is None else None


def _of_everything(everything: list[Site], room: int | None, limit: float | None, work: float | None) -> Picks | None:
    """With layers in floating point as well; of a PSNR out of reach, what comes nearest."""
    if limit is not None:
        for sites in (everything,) if room is not None else (_weighing_both(everything), everything):
            picks = least_cost(sites, limit, room)
            if picks is not None and (work is None or total(everything, picks).cost <= work):
                return picks
    return least_error(everything, room) if work is None else least_error_at(everything, work, room)


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
        None if survey.latency is None else survey.latency.of(layers.cost) + misses.seconds,
    )
