"""Bars: a panel for each number of threads and batch size."""

from pathlib import Path

import matplotlib
import numpy as np

from tfmq_export.bench.report import BenchReport, Row, Setting
from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import ConfigError

FORMATS = (".png", ".pdf", ".svg")
OURS, BASE, OTHER = "#2b6cb0", "#4a5568", "#a0aec0"


def require_format(path: Path) -> None:
    """Refuse a file of another format, before anything is measured.

    Raises:
        ConfigError: names those there are.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name says the format; end it in {', '.join(FORMATS)}")


def save_bars(path: Path, report: BenchReport) -> None:
    """Median of each candidate with a whisker from p10 to p90, the fastest below, speed and accuracy beside each."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(setting.rows) for setting in report.settings)
    figure, axes = plt.subplots(
        len(report.settings),
        1,
        figsize=(8, (0.36 * tallest + 0.9) * len(report.settings) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, setting in zip(axes[:, 0], report.settings, strict=True):
        _panel(axis, setting)
    axes[-1, 0].set_xlabel(f"milliseconds per {report.unit}: median, p10 to p90")
    figure.suptitle(report.about["processor"], fontsize=10)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:].lower())
    plt.close(figure)


def _panel(axis: "matplotlib.axes.Axes", setting: Setting) -> None:
    rows = sorted(setting.rows, key=lambda row: row.timing.median, reverse=True)
    places = np.arange(len(rows))[::-1]
    median = np.asarray([row.timing.median for row in rows]) * 1e3
    low, high = (np.asarray([row.timing.percentile(p) for row in rows]) * 1e3 for p in (10, 90))
    axis.barh(
        places,
        median,
        xerr=[median - low, high - median],
        color=[_color(row, setting) for row in rows],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    for place, row, end in zip(places, rows, high, strict=True):
        said = f"{row.speedup:.2f}x" + (f", {row.accuracy.mean:.1f} dB" if row.accuracy is not None else "")
        axis.annotate(said, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [row.name for row in rows], fontsize=8)
    axis.set_xlim(0, high.max() * (1.12 if setting.rows[0].accuracy is None else 1.25))
    axis.set_title(setting.title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _color(row: Row, setting: Setting) -> str:
    if row.name == setting.base:
        return BASE
    return OURS if row.bundle else OTHER
