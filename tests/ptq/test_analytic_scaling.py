"""Analytic scaling: the model of the error against the error itself, and its minimum."""

import numpy as np
import pytest
import torch
from nets.handwritten import quantized
from torch import Tensor
from torch.nn import functional

from tfmq_export.config import Method
from tfmq_export.ptq.analytic_scaling import NORM, ChannelRanges, LayerModel, WeightSteps, analytic_scaling
from tfmq_export.ptq.equivalent_scaling import fake_quantize_between, fake_quantize_rows, scale_input_channels
from tfmq_export.ptq.pairs import Pairs
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM

INPUT, WEIGHT = QuantSpec(8, signed=False), QuantSpec(4, axis=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows_of(x: Tensor) -> Tensor:
    """Of a 3 x 3 convolution, [places, C, 9]."""
    return functional.unfold(x, 3, padding=1).unflatten(1, (x.shape[1], 9)).permute(0, 3, 1, 2).flatten(0, 1)


def outliers(channels: int = 8) -> tuple[Tensor, Tensor]:
    """An input with one channel a hundred times larger than the others, and a weight that knows nothing of it."""
    x, weight = normal(4, channels, 6, 6), normal(16, channels, 3, 3, seed=1)
    x[:, 3] *= 100
    return x, weight


def quantized_error(x: Tensor, weight: Tensor, tau: Tensor, *, groups: int = 1) -> float:
    """What the layer really loses."""
    scaled = x / tau[:, None, None]
    rows = fake_quantize_rows(scale_input_channels(weight, tau, groups).reshape(len(weight), -1), WEIGHT)
    laid = fake_quantize_between(scaled, scaled.amin(), scaled.amax(), INPUT)
    found, wanted = (
        functional.conv2d(each, kernel, padding=1, groups=groups)
        for each, kernel in ((laid, rows.reshape(weight.shape)), (x, weight))
    )
    return float((found - wanted).square().mean())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
def test_squared_steps_are_those_of_the_norm_of_a_scaled_row(groups: int, outputs: int) -> None:
    rows, tau = normal(groups, outputs, 6, 9), normal(groups, 6, seed=1).exp()

    found = WeightSteps(rows, WEIGHT, None)(tau)

    norm = (tau[:, None, :, None] * rows).abs().pow(NORM).sum((2, 3)).pow(1 / NORM)
    torch.testing.assert_close(found, (norm / WEIGHT.qmax).square(), rtol=1e-4, atol=0)  # sixth roots of fp32 sums


@pytest.mark.parametrize("channels", [6, 5])  # in pairs; and each weight its own neighbour
def test_pairs_of_one_sign_widen_the_steps_by_their_sums(channels: int) -> None:
    spec = QuantSpec(8, axis=0, pair_sum=PAIR_SUM)
    weight, tau = normal(4, channels, 3, 3), normal(channels, seed=1).exp()
    pairs = Pairs.of(weight, 1, 1)
    assert pairs is not None

    found = WeightSteps(weight.reshape(1, 4, channels, 9), spec, pairs)(tau[None])

    rows = scale_input_channels(weight, tau).reshape(4, -1)
    alone = pairs.neighbours == torch.arange(rows.shape[1])
    sums = pairs.sums(rows).pow(NORM) * torch.where(alone, 1.0, 0.5)  # of two neighbours, each tells of both
    total = (rows / spec.qmax).pow(NORM).sum(1) + (sums / PAIR_SUM**NORM).sum(1)
    torch.testing.assert_close(found[0], total.pow(2 / NORM), rtol=1e-4, atol=0)  # sixth roots of fp32 sums


@pytest.mark.parametrize("groups", [1, 4])
def test_an_input_far_from_level_loses_less_under_the_scaling(groups: int) -> None:
    x, weight = outliers()
    weight = weight[:, : 8 // groups]
    windows = windows_of(x)

    tau = analytic_scaling(ChannelRanges.of(windows), [LayerModel.of(weight, groups, WEIGHT, None, windows)], INPUT)

    before, after = (quantized_error(x, weight, each, groups=groups) for each in (torch.ones(8), tau))
    assert after < 0.8 * before
    assert tau[3] > 3 * tau[torch.arange(8) != 3].max()
    assert float(tau.log().mean()) == pytest.approx(0, abs=1e-5)


def test_no_small_change_lowers_the_expected_error_by_much() -> None:
    x, weight = outliers()
    windows = windows_of(x)
    ranges, layer = ChannelRanges.of(windows), LayerModel.of(weight, 1, WEIGHT, None, windows)

    def expected(tau: Tensor) -> float:
        low, high = ranges.scaled(tau)
        return float(layer.error(tau, (high - low) / 255))

    tau = analytic_scaling(ranges, [layer], INPUT)

    around = [expected(tau * (0.2 * normal(8, seed=seed)).exp()) for seed in range(100)]
    assert min(around) > 0.97 * expected(tau)
    assert expected(tau) < 0.8 * expected(torch.ones(8))


def test_a_common_factor_changes_nothing() -> None:
    x, weight = outliers()
    windows = windows_of(x)
    ranges, layer = ChannelRanges.of(windows), LayerModel.of(weight, 1, WEIGHT, None, windows)
    errors = []
    for factor in (1.0, 8.0):
        tau = torch.full((8,), factor)
        low, high = ranges.scaled(tau)
        errors.append(float(layer.error(tau, (high - low) / 255)))

    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_channels_of_zeros_and_layers_of_zeros_have_finite_factors() -> None:
    x, weight = normal(2, 4, 6, 6), normal(3, 4, 3, 3, seed=1)
    x[:, 0] = 0
    weight[:, 1] = 0
    for value, kernel in ((x, weight), (x * 0, weight), (x, weight * 0)):
        windows = windows_of(value)
        tau = analytic_scaling(ChannelRanges.of(windows), [LayerModel.of(kernel, 1, WEIGHT, None, windows)], INPUT)

        assert tau.isfinite().all()
        assert (tau > 0).all()


def test_layers_that_read_one_value_share_a_compromise() -> None:
    windows = normal(500, 4, 1)
    first, second = torch.ones(8, 4), torch.ones(8, 4)
    first[:, 0], second[:, 1] = 20, 20
    models = [LayerModel.of(weight, 1, WEIGHT, None, windows) for weight in (first, second)]
    ranges = ChannelRanges(torch.full((4,), -3.0), torch.full((4,), 3.0))

    alone, both = analytic_scaling(ranges, models[:1], INPUT), analytic_scaling(ranges, models, INPUT)

    assert alone[0] < 0.8 * alone[1]
    assert float(both[0]) == pytest.approx(float(both[1]), rel=0.05)
    assert both[0] < both[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_least_effort_learns_nothing_more_at_8_bits(bits: int) -> None:
    alone, default = (quantized("dit", bits, 8, Method(les=name)).recipe.layers for name in ("analytic", "uniform"))

    scales = [(ours.les_scale, theirs.les_scale) for ours, theirs in zip(alone, default, strict=True)]
    assert all(ours is not None and theirs is not None for ours, theirs in scales)
    assert all(np.allclose(ours, theirs, rtol=1e-5) for ours, theirs in scales) is (bits == 8)  # type: ignore[arg-type]
