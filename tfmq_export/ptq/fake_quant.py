"""Quantize and dequantize in floating point, rounding as ONNX does."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import TimestepGrids


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``scale * (clamp(round(x / scale) + z, qmin, qmax) - z)``, ties to even as QuantizeLinear rounds.

    Args:
        scale: Broadcasts against ``x``.
    """
    codes = (x / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(zero_point).mul_(scale)


def round_through(x: Tensor) -> Tensor:
    """Round; the gradient passes as if nothing had happened (straight-through)."""
    return x + (x.round() - x).detach()


class _FixedGrid(torch.autograd.Function):
    """``fake_quantize`` whose gradient passes straight through where nothing is clipped.

    What autograd makes of ``round_through`` and clamp is the same gradient, with three times the passes over memory.
    Rounding is learned on grids that stand still; an iteration takes about 0.8 of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        codes = (x / scale).round_().add_(zero_point)
        kept = codes.clamp(spec.qmin, spec.qmax)
        ctx.save_for_backward(kept == codes)
        return kept.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """An activation's grid as tensors.

    Attributes:
        scale: Shape () or, for a finite set, [T].
        zero_point: Float, the shape of ``scale``.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, grid: QParams, by_timestep: TimestepGrids | None = None) -> "Grid":
        """From the recipe's arrays."""
        source = by_timestep or grid
        scale, zero_point = np.asarray(source.scale), np.asarray(source.zero_point)
        return cls(grid.spec, torch.from_numpy(scale), torch.from_numpy(zero_point).float())

    def on(self, device: torch.device) -> "Grid":
        """The grid, for activations that live there."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))

    def to_qparams(self) -> QParams:
        """One grid for all timesteps: of a finite set, the one with the widest range."""
        widest = int(self.scale.argmax()) if self.scale.ndim else ...
        scale, zero_point = self.scale.cpu().float().numpy()[widest], self.zero_point.cpu().numpy()[widest]
        return QParams(self.spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))

    def to_timestep_grids(self) -> TimestepGrids | None:
        """The finite set, where there is one."""
        if not self.scale.ndim:
            return None
        return TimestepGrids(self.scale.cpu().float().numpy(), self.zero_point.cpu().to(torch.int32).numpy())

    def lay_over(self, x: Tensor, steps: Tensor) -> Tensor:
        """Fake-quantize an activation.

        Args:
            x: [N, ...] or several rows per sample.
            steps: Position of each sample's timestep in the schedule, [N].
        """
        return fake_quantize(x, *self._for(x, steps), self.spec)

    def lay_softly(self, x: Tensor, steps: Tensor) -> Tensor:
        """The same with gradients for ``x`` and, where they are learned, scale and zero point (LSQ, section 2.1)."""
        scale, zero_point = self._for(x, steps)
        if not (scale.requires_grad or zero_point.requires_grad):
            return _FixedGrid.apply(x, scale, zero_point, self.spec)  # type: ignore[no-any-return,no-untyped-call]
        codes = (round_through(x / scale) + zero_point).clamp(self.spec.qmin, self.spec.qmax)
        return (codes - zero_point) * scale

    def _for(self, x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        if not self.scale.ndim:
            return self.scale, self.zero_point
        steps = steps.to(self.scale.device)
        if len(steps) == 1:
            return self.scale[steps], self.zero_point[steps]
        rows = steps.repeat_interleave(len(x) // len(steps))
        shape = (-1, *[1] * (x.ndim - 1))
        return self.scale[rows].reshape(shape), self.zero_point[rows].reshape(shape)
