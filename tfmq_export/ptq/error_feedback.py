"""Rounding with error feedback (GPTQ, section 3): what one weight loses, those not yet rounded make up for.

    min || x (W - W^) ||^2  =  min tr (W - W^) H (W - W^)^T        H = sum x^T x over the layer's inputs

in closed form, layer by layer, without a gradient step. Learned rounding starts from it and goes on with what
the layers of a block do together.

Inputs of a quantized network err already. Asymmetric calibration (GPTAQ, 2504.02692) holds a layer to what it gives in
the full-precision network instead, whose inputs are ``x'``:

    min || x W^ - x' W ||^2      by rounding  W + W D H^-1 ,        D = sum (x' - x)^T x
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from tfmq_export.ptq.pairs import Pairs, shrink
from tfmq_export.ptq.weights import per_output
from tfmq_export.ptq.windows import Window
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM
from tfmq_export.recipe.recipe import WEIGHT_REACH

SAMPLES = 1 << 14  # inputs that a layer's products are summed over, at most
SAMPLES_PER_WEIGHT = 8  # of those that share their errors
WIDEST = 2304  # weights that share their errors: 256 channels of a 3 x 3 convolution; the cost grows with the cube
DAMPING = 0.01  # of the mean diagonal, as GPTQ adds
SLICE = 2048  # positions in memory at once
STRIPE = 256  # columns of the sums that are added to at once
PANEL = 128  # columns whose errors are carried over to the rest in one product


class InputProducts:
    """``H`` of one layer, summed up as its inputs pass by.

    A layer wider than ``WIDEST`` is taken in pieces of whole channels, whose errors stay among themselves.

    Args:
        node: The layer in its graph.
        weight: [out, in / groups, ...].
        seed: Of the positions to look at.
        asymmetric: Whether ``D`` is summed up as well.
    """

    def __init__(self, node: fx.Node, weight: Tensor, groups: int, seed: int, *, asymmetric: bool = False) -> None:
        kernel = weight.shape[2:]
        self._window = Window.of(node, weight)
        self._groups = groups
        self._generator = torch.Generator().manual_seed(seed)
        self._width = max(2, WIDEST // kernel.numel() // 2 * 2) * kernel.numel()  # no pair of channels is cut
        pieces = torch.split(weight[0].flatten(), self._width)
        self._sums = [
            torch.zeros(groups, len(piece), len(piece), dtype=torch.float32, device=weight.device) for piece in pieces
        ]
        self._drifts = [torch.zeros_like(total) for total in self._sums] if asymmetric else []
        self._count = 0
        self.wanted = min(SAMPLES, SAMPLES_PER_WEIGHT * len(pieces[0]))
        """Positions to look at in all; more do not tell more, however large the picture."""

    def add(self, x: Tensor, most: int, true: Tensor | None = None) -> None:
        """Look at a batch of inputs.

        Args:
            most: Positions to look at.
            true: Of the full-precision network, shaped like ``x``; for asymmetric calibration.
        """
        for rows, *true_rows in self._rows([x] if true is None else [x, true], most):
            parts = self._split(rows)
            for total, part in zip(self._sums, parts, strict=True):
                _add_squares(total, part)
            for others in true_rows:
                for drift, part, off in zip(self._drifts, parts, self._split(others - rows), strict=True):
                    drift.baddbmm_(off.mT, part)
            self._count += len(rows)

    def scale(self, factor: Tensor) -> None:
        """Take the inputs for multiplied by a factor per channel, [in], in place."""
        kernel = 1 if self._window is None else math.prod(self._window.kernel)
        places = factor.reshape(self._groups, -1).repeat_interleave(kernel, 1)
        parts = torch.split(places, self._width, -1)
        for sums in (self._sums, self._drifts):
            for total, part in zip(sums, parts, strict=False):  # no drifts where nobody asked for them
                total.mul_(part[:, :, None]).mul_(part[:, None])

    def pieces(self, noise: Tensor) -> list[Tensor]:
        """``H`` of the inputs on their grid, [groups, n, n] for each piece.

        Args:
            noise: Mean square of what the grid adds to each channel, [in].
        """
        kernel = 1 if self._window is None else math.prod(self._window.kernel)
        diagonal = (self._count * noise).reshape(self._groups, -1).repeat_interleave(kernel, 1)
        return [
            total.triu() + total.triu(1).mT + torch.diag_embed(part)
            for total, part in zip(self._sums, torch.split(diagonal, self._width, -1), strict=True)
        ]

    def aimed(self, weight: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """The weight that gives most nearly, on these inputs, what ``weight`` gives in the full-precision network.

        Args:
            weight: [out, in / groups, ...].
            pieces: Of ``pieces``, finite.
        """
        rows = weight.double().reshape(self._groups, len(weight) // self._groups, -1)
        moved = [
            torch.linalg.solve(_damped(piece.double(), DAMPING), drift.double().mT @ part.mT).mT
            for part, piece, drift in zip(torch.split(rows, self._width, -1), pieces, self._drifts, strict=True)
        ]
        return weight + torch.cat(moved, -1).reshape(weight.shape).to(weight)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Pieces of [groups, n, width] from [n, groups, in / groups]."""
        return torch.split(rows.float().transpose(0, 1), self._width, -1)

    def _rows(self, values: Sequence[Tensor], most: int) -> Iterator[tuple[Tensor, ...]]:
        """Values at the same positions, each [n, groups, in / groups], a slice at a time."""
        if self._window is None:
            opened = [x.reshape(-1, x.shape[-1]) for x in values]
            sizes: Sequence[int] = opened[0].shape[:1]
        else:
            opened = [self._window.open(x) for x in values]
            sizes = opened[0].shape[: values[0].ndim - 1]
        count = math.prod(sizes)
        if count <= most:
            picks = torch.unravel_index(torch.arange(count), tuple(sizes))
        else:
            picks = tuple(torch.randint(size, (most,), generator=self._generator) for size in sizes)
        for part in zip(*(torch.split(pick.to(values[0].device), SLICE) for pick in picks), strict=True):
            yield tuple(x[part].reshape(len(part[0]), self._groups, -1) for x in opened)


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """Add ``x^T x`` on and above the diagonal; what is below repeats it.

    Args:
        total: [groups, n, n].
        rows: [groups, positions, n].
    """
    for start in range(0, rows.shape[2], STRIPE):
        stop = start + STRIPE
        total[:, start:stop, start:].baddbmm_(rows[..., start:stop].mT, rows[..., start:])


def feedback_codes(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    pieces: Sequence[Tensor],
    pairs: Pairs | None = None,
    aimed: Tensor | None = None,
) -> Tensor:
    """Round a weight so that its errors cancel on the layer's inputs; integers as float, shaped like ``weight``.

    Args:
        weight: [out, in / groups, ...].
        scale: [out].
        pieces: ``InputProducts.pieces``, finite.
        pairs: What the codes must keep; what a pair cannot hold, later weights make up for.
        aimed: What to round in the place of the weight, in whose reach the codes stay all the same.
    """
    groups, widths = len(pieces[0]), [piece.shape[-1] for piece in pieces]
    near, rows = (
        [
            torch.split(row, widths, 1)
            for row in (value / per_output(scale, weight)).reshape(groups, len(weight) // groups, -1)
        ]
        for value in (weight, weight if aimed is None else aimed)
    )
    held = [None] * len(widths) if pairs is None else pairs.split(widths)
    codes = [
        torch.cat([_round_columns(*each, spec) for each in zip(group, around, alone, held, strict=True)], 1)
        for group, around, *alone in zip(rows, near, *pieces, strict=True)
    ]
    return torch.stack(codes).reshape(weight.shape)


def _round_columns(steps: Tensor, near: Tensor, products: Tensor, pairs: Pairs | None, spec: QuantSpec) -> Tensor:
    """Column by column, those with the largest inputs first, while there are others to make up for them.

    Args:
        steps: What is rounded, in steps of the weight's grid, [out, n].
        near: The weight, likewise.
        products: [n, n].
    """
    order = products.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(products[order][:, order]).to(steps.dtype)
    left, codes = steps[:, order], torch.empty_like(steps)
    near = (near if pairs is None else pairs.within(near))[:, order]
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
    wide, share = products.double(), DAMPING
    while True:  # finite products are positive once they are damped enough
        lower, failed = torch.linalg.cholesky_ex(_damped(wide, share))
        if not failed:
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor
        share *= 10


def _damped(products: Tensor, share: float) -> Tensor:
    """Products with a share of their mean square added to each, [..., n, n]; of inputs that are all zero, ones."""
    mean = products.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    added = share * torch.where(mean > 0, mean, torch.ones_like(mean) / DAMPING)
    return products + torch.diag_embed(added.expand(products.shape[:-1]))
