"""The picture to choose by: quality against size, and against time where that is known."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from tfmq_export.report.figures import ACCENT, INK, MUTED
from tfmq_export.report.plots import WIDTH, drawn

ALIKE = 50.0
"""dB. Above it nobody sees a difference; the picture ends there, and what lies higher is drawn at its edge."""
LINE = 11  # points from one label to the next
NEAR = 0.3  # of the panel's width: labels that close to each other would overlap


@dataclass(frozen=True, slots=True)
class Point:
    """One bundle.

    Attributes:
        psnr: Mean over its images, dB.
        milliseconds: Of a call; None where it was not timed.
        best: Whether no other bundle beats it.
    """

    label: str
    megabytes: float
    psnr: float
    milliseconds: float | None
    best: bool


def pareto(points: Sequence[Point]) -> str:
    """Bundles by size and image quality, and by time and quality; those in colour are beaten by none."""
    timed = [point for point in points if point.milliseconds is not None]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        _panel(panels[0], points, [point.megabytes for point in points])
        panels[0].set_xlabel("size of the graph (MB)")
        panels[0].set_ylabel("image PSNR (dB)")
        if timed:
            _panel(panels[1], timed, [point.milliseconds or 0.0 for point in timed])
            panels[1].set_xlabel("time of a call (ms)")
        figure.draw_without_rendering()  # places are known only now
        for axis in panels:
            _spread(axis)

    names = ", ".join(point.label for point in points if point.best)
    against = "size and time" if timed else "size"
    return drawn(draw, (WIDTH, 4.4), "pareto", f"Image quality against {against}. Beaten by no other: {names}.")


def _panel(axis: Axes, points: Sequence[Point], costs: Sequence[float]) -> None:
    axis.margins(0.14)
    for point, cost in zip(points, costs, strict=True):
        shown = min(point.psnr, ALIKE)
        label = point.label if point.psnr <= ALIKE else f"{point.label} ({point.psnr:.0f} dB)"
        axis.scatter([cost], [shown], s=44, color=ACCENT if point.best else MUTED, zorder=3)
        axis.annotate(
            label,
            (cost, shown),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK if point.best else MUTED,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    axis.set_xlim(0, max(costs) * 1.5)  # room for the labels, which are to the right


def _spread(axis: Axes) -> None:
    """Move labels that would lie on each other apart, downwards; the line to its point says whose each is."""
    scale, width = 72 / axis.figure.dpi, axis.bbox.width
    placed: list[tuple[float, float]] = []
    labels = [(axis.transData.transform(text.xy), text) for text in axis.texts if isinstance(text, Annotation)]
    for (x, y), text in sorted(labels, key=lambda each: -each[0][1]):
        near = [other for at, other in placed if abs(at - x) < NEAR * width]
        lowest = min([float(y) * scale + LINE, *near]) - LINE
        placed.append((x, min(float(y) * scale, lowest)))
        text.set_position((8 if placed[-1][1] == float(y) * scale else 16, placed[-1][1] - float(y) * scale))
