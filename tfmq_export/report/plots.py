"""The pictures of a page that have axes, by matplotlib."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tfmq_export.report.figures import ACCENT, MUTED, SECOND, STYLE, svg_of
from tfmq_export.report.measured import Feature, Guidance

FLOOR, WORST = 1e-9, 1e-1
"""Ends of the scale of 1 - cosine: below the first float32 sees no difference, above the second nothing is right."""
WIDTH = 9.6  # inches: the page shows them so wide that text has its size
ROWS, ROW = 24, 0.16  # of the heat map: more would be lines nobody can read; inches of each


def over_timesteps(sqnr: Sequence[float], weights: Sequence[float], timesteps: Sequence[float]) -> str:
    """SQNR of the prediction at every model call, and below it how much each timestep counts for the image.

    Args:
        sqnr: dB, a value per call.
        weights: 1 on average; empty where nobody measured them.
        timesteps: In the order of sampling.
    """

    def draw(figure: Figure) -> None:
        count = 2 if weights else 1
        axes = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[:count])[:, 0]
        axes[0].plot(np.arange(len(sqnr)), sqnr, color=ACCENT, linewidth=1.8)
        axes[0].set_ylabel("SQNR (dB)")
        if weights:
            axes[1].bar(np.arange(len(weights)), weights, color=SECOND, width=0.8)
            axes[1].axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
            axes[1].set_ylabel("weight")
        _name_steps(axes[-1], timesteps, len(sqnr))

    said = f"Noise-prediction SQNR over the schedule: {min(sqnr):.1f} dB at worst, {np.mean(sqnr):.1f} dB on average."
    if weights:
        said += f" Weights of the timesteps, from {min(weights):.2g} to {max(weights):.2g} times the average, below."
    return drawn(draw, (WIDTH, 3.6 if weights else 2.5), "steps", said)


def guidance_kept(found: Guidance) -> str:
    """What the prompt changes in the prediction: how much of it is kept, and below it its signal to noise."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        places = np.arange(len(found.kept))
        above.plot(places, found.kept, color=ACCENT, linewidth=1.8, marker=".")
        above.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
        above.set_ylim(*_with(found.kept, 0.0, 1.05))
        above.set_ylabel("kept")
        below.plot(places, found.snr, color=SECOND, linewidth=1.8, marker=".")
        below.axhline(0, color=MUTED, linewidth=0.8, linestyle=":")
        below.set_ylabel("SNR (dB)")
        _name_steps(below, found.timesteps, len(found.kept))

    said = f"Share of guidance that is kept over the schedule: {found.kept.mean():.2f} on average, "
    said += f"{found.kept.min():.2f} at worst. Its signal to noise below, {found.snr.min():.1f} dB at worst."
    return drawn(draw, (WIDTH, 3.6), "guidance", said)


def _with(values: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    """Ends of an axis that shows these and two numbers; what is not finite is not drawn."""
    known = values[np.isfinite(values)]
    return min([low, *known]), max([high, *(known * 1.05)])


def feature_errors(features: Sequence[Feature], timesteps: Sequence[float]) -> str:
    """Error of every temporal feature at every timestep, 1 - cosine, and the largest mismatch at each timestep.

    Args:
        features: At least one.
    """
    rows = by_block(features)
    worst = np.stack(list(rows.values()))  # [blocks, T]
    mismatch = np.abs(np.stack([feature.mismatch for feature in features])).max(0)  # [T]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(ROW * len(rows), 0.7))
        scale = matplotlib.colors.LogNorm(FLOOR, WORST)
        image = above.imshow(worst.clip(FLOOR, WORST), aspect="auto", interpolation="none", norm=scale, cmap="viridis")
        above.set_yticks(np.arange(len(rows)), list(rows), fontsize=7)
        above.grid(False)
        # Plain text: matplotlib would write powers as formulas, which nothing on the page reads (figures.py).
        figure.colorbar(image, ax=above, label="1 - cosine", pad=0.01, aspect=12, format="%.0e")
        below.plot(np.arange(len(mismatch)), mismatch, color=ACCENT, linewidth=1.8)
        below.set_ylim(-0.05, max(1.0, float(mismatch.max()) * 1.05))
        below.set_ylabel("mismatch")
        _name_steps(below, timesteps, len(mismatch))

    said = f"Error of temporal features by block and timestep: 1 - cosine is {worst.max():.1e} at worst"
    said += f", and the largest mismatch is {mismatch.max()} steps."
    return drawn(draw, (WIDTH, 1.5 + ROW * len(rows)), "features", said)


def by_block(features: Sequence[Feature]) -> dict[str, NDArray[np.float64]]:
    """The worst 1 - cosine at each timestep, [T], by block: as many parts of the paths as make at most ROWS rows."""
    paths = [feature.path.split(".") for feature in features]
    if len({path[-1] for path in paths}) == 1 and len(paths[0]) > 1:
        paths = [path[:-1] for path in paths]  # what all have at the end tells none from another
    for length in range(max(map(len, paths)), 0, -1):
        names = [".".join(path[:length]) for path in paths]
        if len(set(names)) <= ROWS:
            break
    found: dict[str, NDArray[np.float64]] = {}
    for name, feature in zip(names, features, strict=True):
        error = 1 - feature.cosine
        found[name] = np.maximum(found.get(name, error), error)
    return found


def _name_steps(axis: Axes, timesteps: Sequence[float] | NDArray[np.float64], calls: int) -> None:
    """Timesteps under the calls, where each call has one of its own."""
    if calls != len(timesteps):
        axis.set_xlabel("model call, in the order of sampling")
        return
    places = np.unique(np.linspace(0, calls - 1, min(calls, 9)).round().astype(int))
    axis.set_xticks(places, [f"{timesteps[place]:g}" for place in places])
    axis.set_xlabel("timestep, from noise to image")


def drawn(draw: Callable[[Figure], None], size: tuple[float, float], name: str, said: str) -> str:
    """A figure of the page's style as SVG; ``name`` and ``said`` as ``svg_of`` takes them, ``size`` in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        return svg_of(figure, name, said)
