"""Equivalent scaling from what is known of each channel, without running a layer.

A layer whose input has the step ``s_x`` and whose weights have the steps ``s_o`` errs at output o by about

    s_x^2 / 12  sum_j tau_j^2 |W_oj|^2  +  s_o^2 / 12  sum_j E[x_j^2] / tau_j^2

(rounding errors are uniform and independent of each other). Both steps follow from ranges, and these from tau. All
terms are positive powers of tau, so the logarithm of the sum is convex in ``log tau``: a geometric program, with one
minimum.

The step of a weight is taken from a norm of its row in place of its largest value. The scale search clips a few large
weights where that pays, and a norm is smooth. It is an even one, so sums of pairs (``ptq/pairs.py``) have it in closed
form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from tfmq_export.ptq.pairs import Pairs
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM

NORM = 6  # of a row of weights
ITERATIONS = 40
LEARNING_RATE = 0.15  # of log tau; with it no factor leaves e^-3..e^3


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRanges:
    """What the channels of a value reach, [C] each.

    Attributes:
        low: Smallest, at most 0.
        high: Largest, at least 0.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> "ChannelRanges":
        """Over windows, [n, C, kernel size]."""
        low, high = torch.aminmax(windows.transpose(0, 1).flatten(1), dim=1)
        return cls(low.clamp_max(0), high.clamp_min(0))

    @property
    def largest(self) -> Tensor:
        """Largest magnitude, [C]."""
        return torch.maximum(-self.low, self.high)

    def scaled(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the range of ``x / tau`` over all channels, scalars."""
        return (self.low / tau).amin(), (self.high / tau).amax()


class WeightSteps:
    """Squared steps of a weight's outputs as a function of tau.

        (qmax s_o)^6  =  sum over j of (tau_j |W_oj|)^6

    and likewise for pairs, where ``(a + b)^6`` is spelled out: its terms are products with matrices that do not change.

    Args:
        rows: The weight, [groups, out / groups, in / groups, kernel size].
        pairs: What its codes must keep.
    """

    def __init__(self, rows: Tensor, spec: QuantSpec, pairs: Pairs | None) -> None:
        self._largest = rows.abs().amax((2, 3), keepdim=True).clamp_min(1e-30)
        magnitude = rows.abs() / self._largest
        own = magnitude.pow(NORM).sum(3) / spec.qmax**NORM
        self._terms = [(NORM, own)]
        self._neighbours = torch.arange(rows.shape[2], device=rows.device)
        if pairs is not None:
            self._neighbours = pairs.neighbours.reshape(rows.shape[2:])[:, 0] // rows.shape[3]
            beside = rows[:, :, self._neighbours]
            other = torch.where(rows * beside > 0, magnitude[:, :, self._neighbours], 0.0)
            alone = self._neighbours == torch.arange(rows.shape[2], device=rows.device)
            times = torch.where(alone, 2.0, 1.0) / PAIR_SUM**NORM  # others are met twice, from either side
            for power in range(NORM // 2, NORM + 1):  # the lower powers are those of the neighbour
                count = comb(NORM, power) / (2 if power == NORM // 2 else 1)
                shared = (magnitude.pow(power) * (other > 0) * other.pow(NORM - power)).sum(3)
                self._terms.append((power, shared * times * count))

    def __call__(self, tau: Tensor) -> Tensor:
        """``s_o^2``, [groups, out / groups].

        Args:
            tau: [groups, in / groups].
        """
        beside = tau[:, self._neighbours]
        powers = [
            (matrix @ (tau**power * beside ** (NORM - power)).unsqueeze(2)).squeeze(2) for power, matrix in self._terms
        ]
        total = torch.stack(powers).sum(0).clamp_min(1e-36)
        return total ** (2 / NORM) * self._largest[:, :, 0, 0].square()


@dataclass(frozen=True, slots=True, eq=False)
class LayerModel:
    """What the expected error of one layer depends on.

    Attributes:
        steps: Of its weights.
        weight_energy: ``|W_j|^2``, the mean over the outputs, [in].
        input_energy: ``E[x_j^2]``, summed over the kernel, [groups, in / groups].
    """

    steps: WeightSteps
    weight_energy: Tensor
    input_energy: Tensor

    @classmethod
    def of(cls, weight: Tensor, groups: int, spec: QuantSpec, pairs: Pairs | None, windows: Tensor) -> "LayerModel":
        """From a layer's weight, [out, in / groups, ...], and windows of its input, [n, in, kernel size]."""
        rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
        energy = rows.square().sum((1, 3)).flatten() / len(weight)
        seen = windows.square().mean(0).sum(1).reshape(groups, -1)
        return cls(WeightSteps(rows, spec, pairs), energy, seen)

    def error(self, tau: Tensor, input_step: Tensor) -> Tensor:
        """Expected squared error of an output, the mean over all, times 12."""
        by_group = tau.reshape(self.input_energy.shape)
        squares = self.steps(by_group)
        of_weights = (squares.sum(1) * (self.input_energy / by_group.square()).sum(1)).sum() / squares.numel()
        return input_step.square() * (tau.square() * self.weight_energy).sum() + of_weights


def analytic_scaling(ranges: ChannelRanges, layers: Sequence[LayerModel], input_spec: QuantSpec) -> Tensor:
    """Tau of a value that ``layers`` read, of least expected error, [in]; its geometric mean is 1."""
    log_tau = torch.zeros_like(ranges.low).requires_grad_()
    optimizer = torch.optim.Adam([log_tau], LEARNING_RATE)
    best, kept = None, log_tau.detach().clone()
    for iteration in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / ITERATIONS)
        optimizer.zero_grad()
        tau = (log_tau - log_tau.detach().amax()).exp()  # a common factor changes nothing
        low, high = ranges.scaled(tau)
        step = (high - low) / (input_spec.qmax - input_spec.qmin)
        error = torch.stack([layer.error(tau, step) for layer in layers]).sum().clamp_min(1e-36)
        if best is None or float(error.detach()) < best:
            best, kept = float(error.detach()), log_tau.detach().clone()
        error.log().backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()
    return (kept - kept.mean()).exp()
