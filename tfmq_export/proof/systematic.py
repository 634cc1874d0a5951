"""What lock-step cannot see as noise: small differences that are everywhere.

A value on the other side of a tie is one step off, here and there. A wrong weight, zero point or epsilon is often less
than that, and 50 dB below the result; but it is in most places of a channel or of a layer. So places are counted.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tfmq_export.proof.agreement import Agreement, Differing

TIES = 2
"""Activations on the other side of a tie, each of which moves the results of a whole kernel, that are not counted: on
small maps they would be a large share."""

CHANNEL = 0.05
"""Share of a channel's results that may differ from fake-quant, above its layer's median channel. Ties leave 0.003 on
emoji32 at w4a8; one weight that is one step off moves most results of its channel."""

LAYER = 0.5
"""Share of the results of a layer's median channel that may differ. Ties leave 0.0003; an input that is computed in
another way moves nearly all."""


def channel_excess(agreements: Sequence[Agreement]) -> NDArray[np.float64]:
    """How much more of a channel differs than of its layer's median channel, the largest of each layer, [layers].

    An activation on the other side of a tie moves results in all channels of the layers that read it. A weight, a scale
    or a bias that is wrong in one channel moves that one, in most places, however little.
    """
    return np.asarray([_beyond_ties(x, x.counts - np.median(x.counts)).max() for x in _together(agreements)] or [0.0])


def layer_share(agreements: Sequence[Agreement]) -> NDArray[np.float64]:
    """Share of the median channel's results that differ, [layers]."""
    return np.asarray(
        [_beyond_ties(x, np.median(x.counts, keepdims=True)).max() for x in _together(agreements)] or [0.0]
    )


def _beyond_ties(layer: Differing, count: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0.0, np.asarray(count, np.float64) - TIES * layer.reach) / layer.results


def _together(agreements: Sequence[Agreement]) -> list[Differing]:
    """Of each layer, over all calls."""
    calls: dict[str, list[Differing]] = {}
    for agreement in agreements:
        for path, found in agreement.channels.items():
            calls.setdefault(path, []).append(found)
    return [Differing.together(each) for each in calls.values()]
