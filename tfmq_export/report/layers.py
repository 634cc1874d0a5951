"""What the recipe decided for each layer, beside what the engine made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe, TimestepGrids
from tfmq_export.report.measured import Realized

BARS = 64
"""Most bars of a histogram: what the width of a small picture shows."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What quantization decided for a convolution or linear layer.

    Attributes:
        low: Least number its input grid holds.
        high: Largest.
        step: Between two neighbours of the grid.
        codes: 8-bit values that add up to one of the input.
        tau: Least and largest factor of equivalent scaling; None where it is off.
        exponents: Input channels by their exponent of power-of-two scaling; empty where it is off.
        weights: How many weights have each code, from the least to the largest, [at most BARS].
        code_range: Least and largest code of the weight's grid.
        taus: Factors of equivalent scaling in order, [at most BARS].
        lows: Least number that the input grid holds at each timestep; empty where one grid serves all.
        highs: Largest, of the same timesteps.
    """

    low: float
    high: float
    step: float
    codes: int
    tau: tuple[float, float] | None
    exponents: Mapping[int, int]
    weights: tuple[int, ...]
    code_range: tuple[int, int]
    taus: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]

    @property
    def tau_spread(self) -> float:
        """Largest factor of equivalent scaling over the least; 1 where it is off."""
        return 1.0 if self.tau is None else self.tau[1] / self.tau[0]

    @property
    def least_exponent(self) -> int:
        """Of power-of-two scaling; 0 where it is off."""
        return min(self.exponents, default=0)


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the table.

    Attributes:
        share: Of the model's multiply-accumulates.
        decided: None for products of attention and for layers in floating point.
        weights: How many are stored as integers; 0 where none are.
    """

    info: LayerInfo
    realized: Realized
    share: float
    decided: Decided | None
    weights: int = 0

    @property
    def state(self) -> str:
        """ "integer", "float" where that was asked, or "lost"."""
        if self.realized.lost:
            return "lost"
        return "integer" if self.info.activation_bits else "float"

    @property
    def why(self) -> str:
        """Why it does not run in integers; empty where it does."""
        return self.realized.lost or self.info.reason


def layers_of(
    infos: Sequence[LayerInfo], recipe: QuantRecipe, realized: Mapping[str, Realized], macs: int
) -> tuple[Layer, ...]:
    """Every layer of a bundle, in the order of its manifest.

    Args:
        macs: Of the whole model.
    """
    decided = {layer.name: _decided(layer) for layer in recipe.layers}
    weights = {layer.name: layer.weight_codes.size for layer in recipe.layers}
    weights |= {layer.name: layer.weight_codes.size for layer in recipe.stored}
    unseen = Realized("", (), "", "")
    return tuple(
        Layer(
            info,
            realized.get(info.name, unseen),
            info.macs / macs if macs else 0.0,
            decided.get(info.name),
            weights.get(info.name, 0),
        )
        for info in infos
    )


def _decided(layer: LayerRecipe) -> Decided:
    low, high = _ends(layer.input)
    lows, highs = ((), ()) if layer.input_by_timestep is None else _by_timestep(layer.input_by_timestep, layer.input)
    taus = None if layer.les_scale is None else np.sort(layer.les_scale)
    values, counts = ((), ()) if layer.pts_exponent is None else np.unique(layer.pts_exponent, return_counts=True)
    spec = layer.weight.spec
    return Decided(
        low=low,
        high=high,
        step=float(layer.input.scale),
        codes=layer.input.spec.codes,
        tau=None if taus is None else (float(taus[0]), float(taus[-1])),
        exponents={int(value): int(count) for value, count in zip(values, counts, strict=True)},
        weights=_histogram(layer.weight_codes, spec.qmin, spec.qmax),
        code_range=(spec.qmin, spec.qmax),
        taus=() if taus is None else _thinned(taus),
        lows=lows,
        highs=highs,
    )


def _ends(grid: QParams) -> tuple[float, float]:
    """The least and the largest number on a grid of one scale."""
    scale, zero = float(grid.scale), int(grid.zero_point)
    return scale * (grid.spec.qmin - zero), scale * (grid.spec.qmax - zero)


def _by_timestep(grids: TimestepGrids, like: QParams) -> tuple[tuple[float, ...], tuple[float, ...]]:
    low, high = (grids.scale * (end - grids.zero_point) for end in (like.spec.qmin, like.spec.qmax))
    return tuple(low.tolist()), tuple(high.tolist())


def _histogram(codes: NDArray[np.int8], low: int, high: int) -> tuple[int, ...]:
    """Weights by code; neighbours share a bar where there are more codes than bars."""
    wide = -(-(high - low + 1) // BARS)
    counts = np.bincount((codes.reshape(-1).astype(np.int64) - low) // wide, minlength=-(-(high - low + 1) // wide))
    return tuple(counts.tolist())


def _thinned(values: NDArray[np.float32]) -> tuple[float, ...]:
    """Some of a row of numbers, its ends among them."""
    places = np.linspace(0, len(values) - 1, min(len(values), BARS)).round().astype(np.int64)
    return tuple(values[places].tolist())
