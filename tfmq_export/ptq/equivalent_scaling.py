"""Learned equivalent scaling, LES (DMQ, section 3.2), and SmoothQuant's closed form beside it.

    Y = (X / tau) (tau W)        tau > 0, one per input channel

moves range from activations to weights where that costs less. ``tau`` is learned layer by layer on
the layer's inputs, at some places of each (``ptq/windows.py``), from where ``ptq/analytic_scaling.py`` put it. The
calibration rows already hold more samples of the timesteps that matter more, so the default weights all rows alike; DMQ
(section 3.3) weights each timestep's loss instead (``adaptive``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from tfmq_export.ptq.analytic_scaling import ChannelRanges
from tfmq_export.ptq.fake_quant import round_through
from tfmq_export.ptq.pairs import Pairs
from tfmq_export.ptq.walk.learning import Batch, Draw, GradientStep, adam, anneal
from tfmq_export.ptq.weights import full_scale
from tfmq_export.recipe.grid import QuantSpec

MOMENTUM = 0.95
FOCUS = 20  # alpha
SMOOTHING = 0.5  # SmoothQuant's migration strength
OUTPUTS = 256  # of a layer that one step looks at: more cost what their weights do, and say no more of an input channel


class Weighting(StrEnum):
    """How much each timestep counts."""

    ADAPTIVE = "adaptive"
    UNIFORM = "uniform"
    LINEAR = "linear"
    QUADRATIC = "quadratic"


class TimestepWeights:
    """Weight of each timestep while one layer learns.

    ``ADAPTIVE``: ``lambda_t = (1 - Lambda_t / sum Lambda)^alpha``, where ``Lambda_t`` is a moving mean of the
    timestep's loss; what costs much already gets less. ``LINEAR`` and ``QUADRATIC`` grow from noise to image.

    Args:
        timesteps: T, in sampling order.
    """

    def __init__(self, kind: Weighting, timesteps: int, device: torch.device | None = None) -> None:
        self._kind = kind
        self._mean_loss = torch.zeros(timesteps, dtype=torch.float64, device=device)

    def __call__(self, steps: Tensor, losses: Tensor) -> Tensor:
        """Weights for a batch, [N]; learns from its losses.

        Args:
            steps: Position of each sample's timestep in the schedule, int64 [N].
            losses: Loss of each sample, [N].
        """
        count = len(self._mean_loss)
        if self._kind is Weighting.UNIFORM:
            return torch.ones_like(losses)
        if self._kind is not Weighting.ADAPTIVE:
            power = 1 if self._kind is Weighting.LINEAR else 2
            return (((steps + 1) / count) ** power).to(losses)
        self._update(steps, losses.detach().double())
        share = self._mean_loss / self._mean_loss.sum()
        weights = ((1 - share) ** FOCUS)[steps].to(losses)
        alone = (self._mean_loss > 0).sum() <= 1  # nothing to weigh one timestep against
        return torch.where(alone, torch.ones_like(losses), weights)

    def _update(self, steps: Tensor, losses: Tensor) -> None:
        """Move the means of the timesteps in this batch; without a look at the values, so that CUDA can record it."""
        zeros = torch.zeros_like(self._mean_loss)
        count = zeros.index_add(0, steps, torch.ones_like(losses))
        mean = zeros.index_add(0, steps, losses) / count.clamp_min(1)
        moved = MOMENTUM * self._mean_loss + (1 - MOMENTUM) * mean
        self._mean_loss.copy_(torch.where(count > 0, moved, self._mean_loss))


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLayer:
    """One of the layers that read a value.

    Attributes:
        windows: Key of what it sees, in a batch.
        weight: Full precision, [out, in / groups, ...].
        groups: Of a convolution; 1 for linear layers.
        weight_spec: Its grid.
        pairs: What its codes must keep.
    """

    windows: str
    weight: Tensor
    groups: int
    weight_spec: QuantSpec
    pairs: Pairs | None = None

    def weight_at(self, turn: Tensor) -> Tensor:
        """Of outputs spread evenly over all, ``OUTPUTS`` of each group or fewer; at the next turn those beside them.

        Args:
            turn: int64, ().
        """
        own = len(self.weight) // self.groups
        stride = turns(own)
        if stride == 1:
            return self.weight
        first = torch.arange(0, len(self.weight), own, device=turn.device)[:, None]
        places = (torch.arange(0, own - stride + 1, stride, device=turn.device) + turn) % own
        return self.weight[(first + places).flatten()]

    def compute(self, windows: Tensor, weight: Tensor) -> Tensor:
        """The layer at some places, without bias, [groups, n, outputs / groups].

        Args:
            windows: [n, in, kernel size].
            weight: In place of its own; of all outputs or of some.
        """
        seen = windows.reshape(len(windows), self.groups, -1).transpose(0, 1)  # [groups, n, in / groups * kernel]
        return seen @ weight.reshape(self.groups, len(weight) // self.groups, -1).mT


def turns(outputs: int) -> int:
    """After how many steps every output of a group was looked at."""
    return -(-outputs // OUTPUTS)


def scale_input_channels(weight: Tensor, tau: Tensor, groups: int = 1) -> Tensor:
    """``tau W``: every input channel of a weight times its factor.

    Args:
        weight: [out, in / groups, ...].
        tau: [in].
    """
    per_group = tau.reshape(groups, 1, -1)  # [groups, 1, in / groups]
    rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return (rows * per_group.unsqueeze(-1)).reshape(weight.shape)


def on_channels(factor: Tensor, x: Tensor, axis: int) -> Tensor:
    """Shape a factor per channel so that it broadcasts against ``x``."""
    axis %= x.ndim
    return factor.reshape([-1 if position == axis else 1 for position in range(x.ndim)])


def fake_quantize_rows(rows: Tensor, spec: QuantSpec, pairs: Pairs | None = None) -> Tensor:
    """Lay a grid over the range that each row of a weight has right now; gradients reach the range too.

    Args:
        rows: [out, n].
        spec: Symmetric.
        pairs: The range is then that of its pairs, too.
    """
    scale = full_scale(rows, spec, pairs).clamp_min(1e-12)
    return round_through(rows / scale).clamp(spec.qmin, spec.qmax) * scale


def fake_quantize_between(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Lay a grid over a range; gradients reach the range too.

    Args:
        low: Scalar, at most 0.
        high: Scalar, at least 0.
    """
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp_min(1e-12)
    zero_point = round_through(-low / scale)
    return (round_through(x / scale) + zero_point).clamp(spec.qmin, spec.qmax).sub(zero_point) * scale


def scaling_losses(
    batch: Batch,
    layers: Sequence[ScaledLayer],
    ranges: ChannelRanges,
    tau: Tensor,
    input_spec: QuantSpec,
    turn: Tensor,
) -> Tensor:
    """``|| X W - Q(X / tau) Q(tau W) ||^2`` of each sample, the mean over the outputs, summed over the layers, [N].

    Args:
        batch: Windows by key, [N, windows, in, kernel size], full precision.
        ranges: Of the value, over all calibration.
        turn: Of the outputs that are looked at, int64, ().
    """
    low, high = ranges.scaled(tau)
    losses = []
    for layer in layers:
        x = batch[layer.windows].flatten(0, 1)
        quantized = fake_quantize_between(x / tau[:, None], low, high, input_spec)
        plain = layer.weight_at(turn)
        scaled = scale_input_channels(plain, tau, layer.groups)
        weight = fake_quantize_rows(scaled.reshape(len(scaled), -1), layer.weight_spec, layer.pairs)
        with torch.no_grad():
            wanted = layer.compute(x, plain)
        of_windows = (layer.compute(quantized, weight) - wanted).square().mean((0, 2))
        losses.append(of_windows.reshape(len(batch[layer.windows]), -1).mean(1))
    return torch.stack(losses).sum(0)


@dataclass(frozen=True, slots=True)
class ScalingSchedule:
    """How long to learn ``log tau``: Adam, cosine to 0.

    Attributes:
        iterations: 0 leaves it where it starts.
        batch: Samples, each with all windows that were noted of it.
        patience: Stop when the mean loss of this many iterations is no better than of those before; 0 never stops.
    """

    iterations: int
    batch: int
    learning_rate: float
    patience: int = 0


def learn_scaling(
    draw: Draw,
    losses_of: Callable[[Batch, Tensor, Tensor], Tensor],
    weights: TimestepWeights,
    schedule: ScalingSchedule,
    start: Tensor,
) -> Tensor:
    """Learn tau of a value.

    Args:
        draw: Batches of windows, and the position of each sample's timestep, ``steps`` [N].
        losses_of: ``scaling_losses`` of a batch under a tau, at a turn.
        start: First tau, [in].
    Returns:
        tau, [in].
    """
    log_tau = start.log().requires_grad_()
    optimizer = adam([log_tau], schedule.learning_rate)
    latest = torch.zeros_like(start[0])
    turn = torch.zeros_like(latest, dtype=torch.int64)

    def loss(batch: Batch) -> Tensor:
        losses = losses_of(batch, log_tau.exp(), turn)
        turn.add_(1)  # in the step itself, so that CUDA records it
        latest.copy_(losses.detach().mean())
        return (weights(batch["steps"], losses) * losses).mean()

    step = GradientStep(draw, loss, [optimizer])
    history: list[float] = []
    for iteration in range(schedule.iterations):
        anneal(optimizer, schedule.learning_rate, iteration / schedule.iterations)
        step()
        if schedule.patience:
            history.append(float(latest))
            if has_settled(history, schedule.patience):
                break
    return log_tau.detach().exp()


def has_settled(history: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` losses are on average no better than the ones before (by 0.1 %)."""
    if patience == 0 or len(history) < 2 * patience:
        return False
    before, now = sum(history[-2 * patience : -patience]), sum(history[-patience:])
    return now > 0.999 * before


def smooth_scaling(x_largest: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """SmoothQuant's ``tau = max|X|^0.5 / max|W|^0.5`` per input channel.

    Args:
        x_largest: Largest magnitude of each channel, [in].
        weights: Of all layers that read the value, [out, in / groups, ...].
    """
    w_largest = torch.stack([_largest_by_input(w, len(x_largest) // w.shape[1]) for w in weights]).amax(0)
    tau = x_largest.clamp_min(1e-5) ** SMOOTHING / w_largest.clamp_min(1e-5) ** (1 - SMOOTHING)
    return tau.clamp_min(1e-5)


def _largest_by_input(weight: Tensor, groups: int) -> Tensor:
    rows = weight.abs().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return rows.amax((1, 3)).reshape(-1)  # [in]
