"""The bits of each layer, where layers differ: a picture, and how many have which."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tfmq_export.report.figures import ACCENT, SECOND
from tfmq_export.report.layers import Layer
from tfmq_export.report.numbers import size
from tfmq_export.report.plots import WIDTH, drawn

TICKS = 12  # names under the picture, at most: more would lie over each other


def differ(layers: Sequence[Layer]) -> bool:
    """Whether somebody chose the bits of any layer."""
    return any(layer.info.chosen for layer in layers) or any(_in_float(layer) for layer in layers)


def bits_of_layers(layers: Sequence[Layer]) -> str:
    """Bits of each layer's weights in the order of the network, and below them what the weights take.

    Args:
        layers: Of a bundle; those without integer weights are left out.
    """
    shown = [layer for layer in layers if layer.weights]
    places = np.arange(len(shown))
    bits = np.array([layer.info.weight_bits for layer in shown])
    kilobytes = bits * np.array([layer.weights for layer in shown]) / 8e3
    inks = [SECOND if _in_float(layer) else ACCENT for layer in shown]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
        above.bar(places, bits, color=inks, width=0.8)
        above.set_yticks([0, 4, 8])
        above.set_ylabel("bits")
        below.bar(places, kilobytes, color=inks, width=0.8)
        below.set_ylabel("kB of weights")
        ticks = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), TICKS)).round().astype(int))
        names = [shown[place].info.path for place in ticks]
        below.set_xticks(ticks, names, rotation=30, ha="right", rotation_mode="anchor", fontsize=7)
        for axes in (above, below):
            axes.grid(visible=False, axis="x")
        if SECOND in inks:
            keys = [Patch(color=ACCENT, label="in integers"), Patch(color=SECOND, label="in floating point")]
            figure.legend(handles=keys, loc="outside upper right", ncols=2, frameon=False)

    return drawn(draw, (WIDTH, 3.8), "bits", f"Bits of each layer in forward order: {in_words(layers)}.")


def in_words(layers: Sequence[Layer]) -> str:
    """How many layers have which bits, and what their weights take."""
    groups: Counter[tuple[int, bool]] = Counter()
    weights: Counter[tuple[int, bool]] = Counter()
    for layer in layers:
        if layer.weights:
            key = (layer.info.weight_bits, _in_float(layer))
            groups[key] += 1
            weights[key] += layer.weights * layer.info.weight_bits // 8
    said = []
    for (bits, in_float), count in sorted(groups.items()):
        kind = "in floating point from weights of" if in_float else "with weights of"
        said.append(f"{count} layer{'s' if count != 1 else ''} {kind} {bits} bits ({size(weights[bits, in_float])})")
    return ", ".join(said)


def _in_float(layer: Layer) -> bool:
    """Whether a layer computes in floating point from stored weights."""
    return bool(layer.weights) and not layer.info.activation_bits
