"""The small pictures of each layer, as SVG paths of a hundred bytes: a model has hundreds of layers.

All lie in a box of ``WIDTH`` by ``HEIGHT`` whose y grows downwards.
"""

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 320, 96


def bars(counts: Sequence[float]) -> str:
    """A bar per number, the highest as high as the box; one closed path."""
    top, wide = max(counts) or 1, WIDTH / len(counts)
    steps = [f"V{_y(count / top)}H{_x((place + 1) * wide)}" for place, count in enumerate(counts)]
    return f"M0 {HEIGHT}{''.join(steps)}V{HEIGHT}Z"


def band(lows: Sequence[float], highs: Sequence[float]) -> str:
    """The ground between two lines, from the least of all numbers to the largest."""
    bottom, top = min(lows), max(highs)
    span = top - bottom or 1.0
    xs = np.linspace(0, WIDTH, len(lows))
    above = [f"{_x(x)} {_y((value - bottom) / span)}" for x, value in zip(xs, highs, strict=True)]
    below = [f"{_x(x)} {_y((value - bottom) / span)}" for x, value in zip(xs, lows, strict=True)]
    return f"M{'L'.join(above)}L{'L'.join(reversed(below))}Z"


def _x(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _y(share: float) -> str:
    """From the bottom of the box, which is 0, to its top, which is 1."""
    return _x(HEIGHT * (1 - share))
