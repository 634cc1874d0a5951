"""Quantize and dequantize in floating point, rounding as ONNX does."""

from torch import Tensor

from tfmq_export.spec import QParams, QuantSpec


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``scale * (clamp(round(x / scale) + z, qmin, qmax) - z)``, ties to even as QuantizeLinear rounds.

    Args:
        scale: Broadcasts against ``x``.
    """
    codes = (x / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(zero_point).mul_(scale)


def fake_quantize_activation(x: Tensor, grid: QParams) -> Tensor:
    """Lay a per-tensor grid over an activation."""
    return fake_quantize(x, x.new_tensor(float(grid.scale)), x.new_tensor(float(grid.zero_point)), grid.spec)
