"""Several bundles on one page, to choose between them: what each costs, what it gives, and whom none beats."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from tfmq_export.bundle.told_apart import folders_apart
from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import ConfigError
from tfmq_export.report.facts import Facts
from tfmq_export.report.images import EXACT_SIDE, Film, Row, data_url
from tfmq_export.report.numbers import decibels, short, size
from tfmq_export.report.pareto import Point, pareto
from tfmq_export.report.render import render
from tfmq_export.report.verdict import Tile, Verdict, verdict_of
from tfmq_export.runtime.measure.compare import Metric


@dataclass(frozen=True, slots=True)
class Candidate:
    """One bundle as the table shows it.

    Attributes:
        label: Short and unique among those compared.
        report: Link to its own page, from the comparison's folder; empty where it has none.
        psnr: Mean, median and worst over its images, dB.
        best: Whether no other is as small and as good (and as fast, where all were timed), and better in one of these.
    """

    facts: Facts
    label: str
    report: str
    verdict: Verdict
    psnr: tuple[float, float, float]
    best: bool

    @property
    def lpips(self) -> float | None:
        """Mean ST-LPIPS of its images; None where its weights were not installed."""
        return self.facts.measured.mean(Metric.IMAGE_LPIPS)

    @property
    def guidance(self) -> tuple[float, float] | None:
        """What is kept of it, on average and at the worst timestep; None where the sampler does not guide."""
        found = self.facts.measured.guidance
        return None if found is None else (float(found.kept.mean()), float(found.kept.min()))

    @property
    def point(self) -> Point:
        """Of the picture."""
        speed = self.facts.speed
        time = None if speed is None else speed.milliseconds
        return Point(self.label, self.facts.file_bytes / 1e6, self.psnr[0], time, self.best)


def write_comparison(facts: Sequence[Facts], path: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: fewer than two bundles, or one whose images were not compared.
    """
    html = comparison_of(facts, path.absolute().parent)
    with replaced_file(path) as partial:
        partial.write_text(html, "utf-8")


def comparison_of(facts: Sequence[Facts], folder: Path) -> str:
    """The page as HTML.

    Args:
        folder: Where it will lie, for its links.
    """
    if len(facts) < 2:
        raise ConfigError("a comparison needs at least two bundles")
    candidates = candidates_of(facts, folder)
    timed = all(each.speed is not None for each in facts)
    images, smooth, ratio = _images(candidates)
    return render(
        "comparison.html",
        title=f"{len(facts)} bundles compared",
        candidates=candidates,
        figure=pareto([each.point for each in candidates]),
        tiles=tiles_of(candidates),
        counts=sorted({len(each.measured.values[Metric.IMAGE_PSNR]) for each in facts}),
        bases=sorted({each.speed.base for each in facts if each.speed is not None}),
        shown=any(each.speed is not None for each in facts),
        judged=any(each.lpips is not None for each in candidates),
        guided=any(each.guidance is not None for each in candidates),
        timed=timed,
        sources=sorted({x.facts.bundle.manifest.source for x in candidates}),
        alike=same_model(facts),
        images=images,
        smooth=smooth,
        ratio=ratio,
    )


def candidates_of(facts: Sequence[Facts], folder: Path) -> tuple[Candidate, ...]:
    """Every bundle, those on the front marked."""
    timed = all(each.speed is not None for each in facts)
    best = front([_costs(each, timed) for each in facts])
    return tuple(
        Candidate(each, label, _link(each, folder), verdict_of(each), _psnr(each), first)
        for each, label, first in zip(facts, labels_of(facts), best, strict=True)
    )


def tiles_of(candidates: Sequence[Candidate]) -> tuple[Tile, ...]:
    """Who is first in what."""
    best = max(candidates, key=lambda each: each.psnr[0])
    smallest = min(candidates, key=lambda each: each.facts.file_bytes)
    tiles = [
        Tile("Best images", decibels(best.psnr[0]), "", f"{best.label}, in {size(best.facts.file_bytes)}"),
        Tile("Smallest", size(smallest.facts.file_bytes), "", f"{smallest.label}, {decibels(smallest.psnr[0])}"),
    ]
    timed = [(each.facts.speed, each) for each in candidates if each.facts.speed is not None]
    if timed:
        speed, fastest = min(timed, key=lambda pair: pair[0].milliseconds)
        note = f"{fastest.label}, {speed.times:.2f} times as fast as {speed.base}; {speed.setting}, {speed.processor}"
        tiles.append(Tile("Fastest", short(speed.milliseconds), f"ms a {speed.unit}", note))
    return tuple(tiles)


def front(costs: Sequence[tuple[float, ...]]) -> tuple[bool, ...]:
    """Which of some candidates no other dominates: is nowhere worse, and somewhere better.

    Args:
        costs: What each costs, less is better; all of the same length.
    """
    values = np.asarray(costs, np.float64)
    return tuple(not any((other <= one).all() and (other < one).any() for other in values) for one in values)


def labels_of(facts: Sequence[Facts]) -> list[str]:
    """Preset and target; the folders where two share them."""
    brief = [f"{each.bundle.manifest.preset} {each.bundle.manifest.target}" for each in facts]
    return brief if len(set(brief)) == len(brief) else folders_apart([each.bundle.root for each in facts])


def same_model(facts: Sequence[Facts]) -> bool:
    """Whether all were compiled from the same weights."""
    return len({each.bundle.manifest.fingerprint for each in facts}) == 1


def _costs(facts: Facts, timed: bool) -> tuple[float, ...]:
    """Bytes and lost dB; and time, where all were timed."""
    costs = (float(facts.file_bytes), -_psnr(facts)[0])
    return (*costs, facts.speed.milliseconds) if timed and facts.speed is not None else costs


def _psnr(facts: Facts) -> tuple[float, float, float]:
    values = facts.measured.values.get(Metric.IMAGE_PSNR)
    if not values:
        raise ConfigError(f"{facts.bundle.root}: its images were not compared; compile it again")
    return float(np.mean(values)), float(np.median(values)), min(values)


def _link(facts: Facts, folder: Path) -> str:
    page = facts.page.absolute()
    return quote(Path(os.path.relpath(page, folder)).as_posix()) if page.exists() else ""


def _images(candidates: Sequence[Candidate]) -> tuple[tuple[Row, ...], bool, str]:
    """Full precision and every bundle from the same noise, where all began with it."""
    pictures = [x.facts.pictures for x in candidates if x.facts.pictures is not None]
    if len(pictures) < len(candidates):
        return (), False, "1"
    first = pictures[0].reference
    shared = min(len(each.reference) for each in pictures)
    if not all(np.array_equal(each.reference[:shared], first[:shared]) for each in pictures):
        return (), False, "1"
    batches = [("Full precision", first), *((x.label, y.compiled) for x, y in zip(candidates, pictures, strict=True))]
    rows = [Row(title, tuple(Film("", data_url(image)) for image in batch[:shared])) for title, batch in batches]
    return tuple(rows), max(first.shape[1:3]) > EXACT_SIDE, f"{first.shape[2]} / {first.shape[1]}"
