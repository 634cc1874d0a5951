from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from nets.onnx_graphs import build, infer
from onnx import helper

from tfmq_export.config import Method
from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.fake_quant import Grid, fake_quantize
from tfmq_export.ptq.observers import (
    ESTIMATORS,
    Observation,
    activation_grid,
    merge,
    merge_channels,
    observe,
    observe_channels,
)
from tfmq_export.recipe.grid import QuantSpec


def qdq_model(scale: float, zero_point: int) -> onnx.ModelProto:
    grid = ["scale", "zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", *grid], ["y"]),
    ]
    return build(nodes, {"x": [None]}, {"y": [None]}, {"scale": np.float32(scale), "zero_point": np.uint8(zero_point)})


ONE_STEP = torch.tensor([0])
"""Every row at the first timestep of the schedule."""


def unsigned(bits: int) -> QuantSpec:
    return QuantSpec(bits, signed=False)


def grid(scale: float, zero_point: int, bits: int = 8) -> Grid:
    return Grid(unsigned(bits), torch.tensor(scale), torch.tensor(float(zero_point)))


def seen(values: torch.Tensor) -> Observation:
    return Observation(float(values.min()), float(values.max()), values)


def squared_error(values: torch.Tensor, on: Grid) -> float:
    return float((on.lay_over(values, ONE_STEP).double() - values.double()).square().mean())


def test_ties_round_to_the_even_code() -> None:
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])

    rounded = fake_quantize(ties, torch.tensor(1.0), torch.tensor(0.0), QuantSpec(8))

    assert rounded.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("zero_point", [0, 3, 127, 128, 255])
@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_fake_quantize_is_onnx_runtimes_quantize_dequantize_to_the_last_bit(zero_point: int, scale: float) -> None:
    # Every tie from below the grid to above it, and numbers in between. Rounding ``x / s + z`` as one number
    # would differ on each tie of an odd zero point.
    x = np.concatenate([np.arange(-300, 300) + 0.5, np.linspace(-300, 300, 997)]).astype(np.float32)
    x *= np.float32(scale)

    ours = grid(scale, zero_point).lay_over(torch.from_numpy(x), ONE_STEP)

    (theirs,) = infer(qdq_model(scale, zero_point), {"x": x})
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize(("low", "high"), [(-3.7, 9.1), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0), (-1e-3, 700.0)])
def test_zero_is_exact_and_the_zero_point_inside_the_grid(low: float, high: float, estimator: str, bits: int) -> None:
    values = torch.empty(500).uniform_(low, high, generator=torch.Generator().manual_seed(0))

    found = activation_grid(Observation(low, high, values), unsigned(bits), estimator)

    assert found.lay_over(torch.zeros(1), ONE_STEP).item() == 0
    assert 0 <= found.zero_point <= found.spec.qmax == 2**bits - 1


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("mean", [1, 20, -20])  # around zero, all positive, all negative
def test_min_max_covers_the_observed_range(mean: int, bits: int) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 3 + mean

    found = activation_grid(seen(values), unsigned(bits), "minmax")

    # Half a step for rounding to the grid, half a step for the zero point's own rounding.
    assert (found.lay_over(values, ONE_STEP) - values).abs().max() <= 1.001 * found.scale


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("tail", [1.0, 3.0, 8.0])
def test_mse_is_never_worse_than_min_max_and_better_where_outliers_are(bits: int, tail: float) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2))
    values[:3] *= tail**2
    observation = seen(values)

    by_mse, by_range = (
        squared_error(values, activation_grid(observation, unsigned(bits), estimator))
        for estimator in ("mse", "minmax")
    )

    # Min-max is one of its candidates; the search compares in fp32.
    assert by_mse <= by_range * (1 + 1e-5)
    if tail == 3.0 and bits == 4:
        assert by_mse < 0.9 * by_range


def test_every_estimator_may_be_asked_for() -> None:
    assert set(get_args(Method.model_fields["estimator"].annotation)) == set(ESTIMATORS)


def test_observing_keeps_the_true_range_and_a_sample_of_the_values() -> None:
    x = torch.arange(10_000.0).reshape(10, 1000)

    found = observe(x, 64, torch.Generator().manual_seed(3))

    assert (found.low, found.high) == (0, 9999)
    assert found.values.shape == (64,)
    assert set(found.values.tolist()) <= set(x.flatten().tolist())


def test_merging_takes_the_union() -> None:
    parts = [seen(torch.tensor([-1.0, 2.0])), seen(torch.tensor([0.0, 5.0]))]

    both = merge(parts)

    assert (both.low, both.high, both.values.tolist()) == (-1, 5, [-1, 2, 0, 5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_range_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        observe(torch.tensor([0.0, bad, 1.0]), 2, torch.Generator())


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_signed_grid_is_centred_on_zero_and_as_fine_as_the_values_allow(estimator: str) -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(20_000, generator=generator) * 2 + 0.5

    grid = activation_grid(seen(values), QuantSpec(8, signed=True), estimator)

    assert grid.zero_point == 0
    largest = values.abs().max()
    assert 0.2 * largest < grid.scale * 127 <= largest * 1.0001
    kept = fake_quantize(values, grid.scale, grid.zero_point, grid.spec)
    assert (kept - values).square().mean() < 0.02 * values.square().mean()
    assert kept.min() < -0.9 * values.min().abs().clamp_max(grid.scale * 127)  # both halves are used


@pytest.mark.parametrize(("shape", "axis"), [((3, 1, 5, 4, 4), 2), ((3, 7, 5), -1)])
def test_channels_are_scaled_after_they_were_seen(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([0.3, 1.7, 0.01, 40.0, 1.0], dtype=torch.float64)
    along = [1] * len(shape)
    along[axis] = 5
    scaled = x * factor.float().reshape(along)

    late = observe_channels(x, axis, 60, torch.Generator().manual_seed(1)).scaled(factor)

    early = observe(scaled, 60, torch.Generator().manual_seed(1))
    assert (late.low, late.high) == (early.low, early.high)
    assert torch.equal(late.values, early.values)


def test_channels_seen_in_parts_are_seen_as_one() -> None:
    parts = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    factor = torch.tensor([2.0, 0.5, 8.0])

    merged = merge_channels([observe_channels(part, 1, 5, torch.Generator()) for part in parts]).scaled(factor)

    whole = torch.cat(parts) * factor[:, None]
    assert (merged.low, merged.high) == (float(whole.min()), float(whole.max()))
    assert len(merged.values) == 15
