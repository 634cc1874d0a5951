"""Rounding with error feedback (GPTQ, section 3): what one weight loses, those not yet rounded make up for.

    min || x (W - W^) ||^2  =  min tr (W - W^) H (W - W^)^T        H = sum x^T x over the layer's inputs

in closed form, layer by layer, without a gradient step. Learned rounding starts from it and goes on with what
the layers of a block do together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from tfmq_export.ptq.pairs import Pairs, shrink
from tfmq_export.ptq.weights import per_output
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM
from tfmq_export.recipe.recipe import WEIGHT_REACH

SAMPLES = 1 << 14  # inputs that a layer's products are summed over
WIDEST = 2304  # weights that share their errors: 256 channels of a 3 x 3 convolution; the cost grows with the cube
DAMPING = 0.01  # of the mean diagonal, as GPTQ adds
SLICE = 2048  # positions in memory at once
PANEL = 128  # columns whose errors are carried over to the rest in one product


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution looks, axis by axis.

    Attributes:
        padding: Before and after.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node, kernel: Sequence[int]) -> "Window":
        """The window of a convolution in a graph."""
        given: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), node.args[3:], strict=False)) | node.kwargs
        stride, dilation = (_per_axis(given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":  # what is odd goes behind
            spread = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            sides = tuple((width // 2, width - width // 2) for width in spread)
        else:
            sides = tuple((side, side) for side in _per_axis(0 if padding == "valid" else padding, len(kernel)))
        return cls(tuple(kernel), stride, sides, dilation)

    def open(self, x: Tensor) -> Tensor:
        """What the kernel sees at every position of [N, C, ...], a view: [N, positions ..., C, kernel ...]."""
        x = functional.pad(x, [side for sides in reversed(self.padding) for side in sides])
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x.movedim(1, 1 + len(self.kernel))


class InputProducts:
    """``H`` of one layer, summed up as its inputs pass by.

    A layer wider than ``WIDEST`` is taken in pieces of whole channels, whose errors stay among themselves.

    Args:
        node: The layer in its graph.
        weight: [out, in / groups, ...].
        seed: Of the positions to look at.
    """

    def __init__(self, node: fx.Node, weight: Tensor, groups: int, seed: int) -> None:
        kernel = weight.shape[2:]
        self._window = Window.of(node, kernel) if len(kernel) else None
        self._groups = groups
        self._generator = torch.Generator().manual_seed(seed)
        self._width = max(2, WIDEST // kernel.numel() // 2 * 2) * kernel.numel()  # no pair of channels is cut
        pieces = torch.split(weight[0].flatten(), self._width)
        self._sums = [
            torch.zeros(groups, len(piece), len(piece), dtype=torch.float32, device=weight.device) for piece in pieces
        ]
        self._count = 0

    def add(self, x: Tensor, most: int) -> None:
        """Look at a batch of inputs.

        Args:
            most: Positions to look at.
        """
        for rows in self._rows(x, most):
            by_group = rows.float().transpose(0, 1)  # [groups, positions, in / groups]
            for total, part in zip(self._sums, torch.split(by_group, self._width, -1), strict=True):
                total.baddbmm_(part.mT, part)
            self._count += len(rows)

    def pieces(self, noise: Tensor) -> list[Tensor]:
        """``H`` of the inputs on their grid, [groups, n, n] for each piece.

        Args:
            noise: Mean square of what the grid adds to each channel, [in].
        """
        kernel = 1 if self._window is None else math.prod(self._window.kernel)
        diagonal = (self._count * noise).reshape(self._groups, -1).repeat_interleave(kernel, 1)
        return [
            total + torch.diag_embed(part)
            for total, part in zip(self._sums, torch.split(diagonal, self._width, -1), strict=True)
        ]

    def _rows(self, x: Tensor, most: int) -> Iterator[Tensor]:
        """Inputs at some positions, [n, groups, in / groups], a slice at a time."""
        if self._window is None:
            opened = x.reshape(-1, x.shape[-1])
            sizes: Sequence[int] = opened.shape[:1]
        else:
            opened = self._window.open(x)
            sizes = opened.shape[: x.ndim - 1]
        count = math.prod(sizes)
        if count <= most:
            picks = torch.unravel_index(torch.arange(count), tuple(sizes))
        else:
            picks = tuple(torch.randint(size, (most,), generator=self._generator) for size in sizes)
        for part in zip(*(torch.split(pick.to(x.device), SLICE) for pick in picks), strict=True):
            rows = opened[part]
            yield rows.reshape(len(rows), self._groups, -1)


def feedback_codes(
    weight: Tensor, scale: Tensor, spec: QuantSpec, pieces: Sequence[Tensor], pairs: Pairs | None = None
) -> Tensor:
    """Round a weight so that its errors cancel on the layer's inputs; integers as float, shaped like ``weight``.

    Args:
        weight: [out, in / groups, ...].
        scale: [out].
        pieces: ``InputProducts.pieces``, finite.
        pairs: What the codes must keep; what a pair cannot hold, later weights make up for.
    """
    groups, widths = len(pieces[0]), [piece.shape[-1] for piece in pieces]
    rows = (weight / per_output(scale, weight)).reshape(groups, len(weight) // groups, -1)
    held = [None] * len(widths) if pairs is None else pairs.split(widths)
    codes = [
        torch.cat([_round_columns(*each, spec) for each in zip(group, alone, held, strict=True)], 1)
        for group, *alone in zip((torch.split(row, widths, 1) for row in rows), *pieces, strict=True)
    ]
    return torch.stack(codes).reshape(weight.shape)


def _round_columns(steps: Tensor, products: Tensor, pairs: Pairs | None, spec: QuantSpec) -> Tensor:
    """Column by column, those with the largest inputs first, while there are others to make up for them.

    Args:
        steps: The weight in steps of its grid, [out, n].
        products: [n, n].
    """
    order = products.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(products[order][:, order]).to(steps.dtype)
    left, codes = steps[:, order], torch.empty_like(steps)
    near = left if pairs is None else pairs.within(steps)[:, order]
    lowest = (near - WEIGHT_REACH).ceil().clamp(spec.qmin, spec.qmax)
    highest = (near + WEIGHT_REACH).floor().clamp(spec.qmin, spec.qmax)
    if pairs is not None:  # a weight that is its own neighbour
        alone = pairs.neighbours[order] == order
        room = torch.where(alone, PAIR_SUM // 2, PAIR_SUM)
        lowest, highest = lowest.clamp_min(-room), highest.clamp_max(room)
    # Where each column's neighbour is, in the order of the columns.
    places = list(range(len(order))) if pairs is None else order.argsort()[pairs.neighbours[order]].tolist()
    for start in range(0, len(order), PANEL):
        stop = min(start + PANEL, len(order))
        errors = left.new_empty(len(steps), stop - start)
        for column in range(start, stop):
            own, place = left[:, column], places[column]
            wanted = own if place <= column else _share(own, left[:, place])
            rounded = wanted.round().clamp(lowest[:, column], highest[:, column])
            if place < column:
                rounded = _beside(codes[:, place], rounded)
            codes[:, column] = rounded
            error = (own - rounded) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()]


def _share(own: Tensor, other: Tensor) -> Tensor:
    """What the first of a pair may want, [out]: of what both have too much, each gives up half."""
    excess = torch.where(own * other > 0, (own + other).abs() - PAIR_SUM, torch.zeros_like(own))
    return shrink(own, excess.clamp_min(0) / 2)


def _beside(other: Tensor, rounded: Tensor) -> Tensor:
    """The second of a pair takes what the first has left, [out]; that lies within ``WEIGHT_REACH`` like the rest."""
    return rounded.clamp(-PAIR_SUM - other.clamp_max(0), PAIR_SUM - other.clamp_min(0))


def _inverse_factor(products: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse, float64."""
    wide = products.double()
    diagonal = wide.diagonal()
    mean = diagonal.mean()
    damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    while True:  # finite products are positive once they are damped enough
        damped = wide + torch.diag(damping.expand(len(wide)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor
        damping = 10 * damping


def _per_axis(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * count if len(values) == 1 else values
