from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tfmq_export.ptq.analytic_scaling import ChannelRanges
from tfmq_export.ptq.equivalent_scaling import (
    ScaledLayer,
    ScalingSchedule,
    TimestepWeights,
    Weighting,
    fake_quantize_between,
    fake_quantize_rows,
    has_settled,
    learn_scaling,
    on_channels,
    scale_input_channels,
    scaling_losses,
    smooth_scaling,
)
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.recipe.grid import QuantSpec

Compute = Callable[[Tensor, Tensor], Tensor]
ACTIVATION, WEIGHT = QuantSpec(8, signed=False), QuantSpec(4, axis=0)
CHANNELS = 8
FIRST = torch.tensor(0)  # turn


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def convolution(groups: int) -> Compute:
    return lambda x, weight: functional.conv2d(x, weight, None, padding=1, groups=groups)


def outlier_layer() -> tuple[Tensor, ScaledLayer]:
    """An input with one channel a hundred times larger than the others, whose weights are as much smaller."""
    x, weight = normal(0, 64, CHANNELS), normal(1, 16, CHANNELS)
    x[:, 3] *= 100
    weight[:, 3] /= 100
    return x, ScaledLayer("x", weight, 1, WEIGHT)


def losses(x: Tensor, layers: Sequence[ScaledLayer], tau: Tensor) -> Tensor:
    """Of a linear layer's inputs, [N, in]: one window of one token each."""
    windows = x[:, None, :, None]
    return scaling_losses({"x": windows}, layers, ChannelRanges.of(windows[:, 0]), tau, ACTIVATION, FIRST)


def learn(
    draw: Draw, layer: ScaledLayer, x: Tensor, weights: TimestepWeights, schedule: ScalingSchedule, start: Tensor
) -> Tensor:
    ranges = ChannelRanges.of(x[:, :, None])
    return learn_scaling(
        draw,
        lambda batch, tau, turn: scaling_losses(batch, [layer], ranges, tau, ACTIVATION, turn),
        weights,
        schedule,
        start,
    )


# -- the identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_scaling_changes_no_convolution(groups: int) -> None:
    x, tau = normal(0, 2, 8, 5, 5, dtype=torch.float64), normal(1, 8, dtype=torch.float64).exp()
    weight = normal(2, 16, 8 // groups, 3, 3, dtype=torch.float64)
    conv = convolution(groups)

    scaled = conv(x / on_channels(tau, x, 1), scale_input_channels(weight, tau, groups))

    torch.testing.assert_close(scaled, conv(x, weight), rtol=1e-12, atol=1e-12)  # float64 noise
    assert not torch.allclose(conv(x, scale_input_channels(weight, tau, groups)), conv(x, weight))


@pytest.mark.parametrize("shape", [(4, 6), (2, 7, 6)])
def test_scaling_changes_no_linear_layer(shape: tuple[int, ...]) -> None:
    x, tau = normal(0, *shape, dtype=torch.float64), normal(1, 6, dtype=torch.float64).exp()
    weight = normal(2, 3, 6, dtype=torch.float64)

    scaled = functional.linear(x / on_channels(tau, x, -1), scale_input_channels(weight, tau))

    torch.testing.assert_close(scaled, functional.linear(x, weight), rtol=1e-12, atol=1e-12)  # float64 noise


def test_grouped_weights_meet_the_factors_of_their_own_channels() -> None:
    weight, tau = torch.ones(4, 2, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0])

    scaled = scale_input_channels(weight, tau, groups=2)

    assert scaled[:, :, 0, 0].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


# -- timestep weighting ---------------------------------------------------------------------------


def test_adaptive_weights_follow_the_formula() -> None:
    weights = TimestepWeights(Weighting.ADAPTIVE, 3)
    steps = torch.tensor([0, 0, 1])
    mean_loss = torch.zeros(3, dtype=torch.float64)

    for losses in (torch.tensor([2.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 5.0]), torch.tensor([0.5, 3.5, 0.25])):
        found = weights(steps, losses)

        present = torch.tensor([losses[:2].mean(), losses[2]], dtype=torch.float64)
        mean_loss[:2] = 0.95 * mean_loss[:2] + 0.05 * present
        expected = (1 - mean_loss / mean_loss.sum()) ** 20
        torch.testing.assert_close(found.double(), expected[steps], rtol=1e-6, atol=0)  # returned as fp32


def test_only_timesteps_of_the_batch_are_updated() -> None:
    weights = TimestepWeights(Weighting.ADAPTIVE, 4)
    weights(torch.tensor([0, 1, 2, 3]), torch.ones(4))
    weights(torch.tensor([2, 2]), torch.tensor([21.0, 21.0]))  # Lambda_2 = 0.95 * 0.05 + 0.05 * 21

    now = weights(torch.tensor([0]), torch.tensor([1.0]))  # Lambda_0 = 0.95 * 0.05 + 0.05

    mean_loss = torch.tensor([0.0975, 0.05, 1.0975, 0.05], dtype=torch.float64)
    expected = float((1 - mean_loss[0] / mean_loss.sum()) ** 20)
    assert now.item() == pytest.approx(expected, rel=1e-6)  # fp32


def test_a_timestep_that_costs_much_gets_less() -> None:
    weights = TimestepWeights(Weighting.ADAPTIVE, 4)

    first, *_, last = weights(torch.arange(4), torch.tensor([8.0, 4.0, 2.0, 1.0])).tolist()

    assert 0 <= first < last <= 1


def test_weights_carry_no_gradient() -> None:
    losses = torch.ones(3, requires_grad=True)
    for kind in Weighting:
        assert not TimestepWeights(kind, 3)(torch.arange(3), losses).requires_grad


def test_uniform_is_one_and_the_others_grow_from_noise_to_image() -> None:
    steps, losses = torch.arange(4), torch.tensor([9.0, 1.0, 4.0, 2.0])

    uniform, linear, quadratic = (
        TimestepWeights(kind, 4)(steps, losses) for kind in (Weighting.UNIFORM, Weighting.LINEAR, Weighting.QUADRATIC)
    )

    assert uniform.tolist() == [1] * 4
    assert linear.tolist() == [0.25, 0.5, 0.75, 1]
    assert quadratic.tolist() == [0.0625, 0.25, 0.5625, 1]


# -- fake quantization whose range moves ----------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_grids_cover_what_they_see(bits: int) -> None:
    x = normal(0, 6, 50) * torch.logspace(-2, 2, 6)[:, None]

    activation = fake_quantize_between(x, x.amin(), x.amax(), QuantSpec(bits, signed=False))
    weight = fake_quantize_rows(x, QuantSpec(bits, axis=0))

    # Half a step for the value, half a step for the zero point; fp32 on top.
    assert (activation - x).abs().max() <= 1.001 * (x.max() - x.min()) / (2**bits - 1)
    largest = x.abs().amax(1, keepdim=True)
    assert ((weight - x).abs() <= 0.501 * largest / (2 ** (bits - 1) - 1)).all()


def test_the_scale_receives_its_gradient_through_a_weights_grid() -> None:
    spec = QuantSpec(4, axis=0)
    x = torch.tensor([[0.9, -7.0, 3.3]], dtype=torch.float64, requires_grad=True)

    fake_quantize_rows(x, spec)[0, 0].backward()

    # s = 7 / 7 = 1 and y = s round(x / s): straight through, dy/dx0 = 1 and dy/ds = round(x0/s) - x0/s = 0.1,
    # while ds/dx1 = -1/7.
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -0.1 / 7, 0.0]], dtype=torch.float64))


def test_the_scale_receives_its_gradient_through_an_activations_grid() -> None:
    spec = QuantSpec(4, signed=False)
    x = torch.tensor([0.0, 2.4, 15.0], dtype=torch.float64, requires_grad=True)

    fake_quantize_between(x, x.new_zeros(()), x.amax(), spec)[1].backward()

    # s = (15 - 0) / 15 = 1: dy1/ds = round(2.4) - 2.4 = -0.4, ds/dx2 = 1/15.
    assert x.grad is not None
    assert x.grad[1:].tolist() == pytest.approx([1.0, -0.4 / 15])


def rows_of_weights(x: Tensor) -> Tensor:
    return fake_quantize_rows(x, WEIGHT)


def test_a_tensor_of_zeros_stays_zero() -> None:
    for quantize in (lambda x: fake_quantize_between(x, x.amin(), x.amax(), ACTIVATION), rows_of_weights):
        x = torch.zeros(2, 3, requires_grad=True)
        y = quantize(x)
        y.sum().backward()
        assert not y.any()
        assert x.grad is not None
        assert x.grad.isfinite().all()


# -- learning -------------------------------------------------------------------------------------


def test_losses_are_those_of_each_sample_and_add_up_over_the_layers() -> None:
    x, layer = outlier_layer()
    second = ScaledLayer("x", normal(5, 3, CHANNELS), 1, WEIGHT)
    tau = normal(6, CHANNELS).exp()

    both = losses(x, [layer, second], tau)

    scaled = x / tau
    quantized = fake_quantize_between(scaled, scaled.amin(), scaled.amax(), ACTIVATION)
    expected = torch.zeros(len(x))
    for each in (layer, second):
        found = quantized @ fake_quantize_rows(each.weight * tau, WEIGHT).T
        expected += (found - x @ each.weight.T).square().mean(1)
    assert both.shape == (64,)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-8)  # fp32 sums in another order


@pytest.mark.parametrize("groups", [1, 4])
def test_the_loss_over_all_windows_is_that_of_the_convolution(groups: int) -> None:
    x, weight, tau = normal(0, 3, 8, 5, 5), normal(1, 16, 8 // groups, 3, 3), normal(2, 8).exp()
    windows = functional.unfold(x, 3, padding=1).unflatten(1, (8, 9)).permute(0, 3, 1, 2)  # [N, places, in, kernel]
    ranges = ChannelRanges.of(windows.flatten(0, 1))

    layer = ScaledLayer("x", weight, groups, WEIGHT)
    found = scaling_losses({"x": windows}, [layer], ranges, tau, ACTIVATION, FIRST)

    scaled = x / on_channels(tau, x, 1)
    quantized = fake_quantize_between(scaled, scaled.amin().clamp(max=0), scaled.amax().clamp(min=0), ACTIVATION)
    rows = fake_quantize_rows(scale_input_channels(weight, tau, groups).reshape(16, -1), WEIGHT)
    conv = convolution(groups)
    expected = (conv(quantized, rows.reshape(weight.shape)) - conv(x, weight)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)  # fp32 sums in another order


@pytest.mark.parametrize(("outputs", "groups"), [(768, 1), (700, 1), (1536, 2)])
def test_a_step_looks_at_some_outputs_of_each_group_and_the_next_at_others(outputs: int, groups: int) -> None:
    weight = torch.arange(float(outputs))[:, None].expand(-1, CHANNELS)
    layer = ScaledLayer("x", weight, groups, WEIGHT)
    own = outputs // groups

    turns = [layer.weight_at(torch.tensor(turn)) for turn in range(3)]

    for seen in turns:
        assert seen.shape == (own // 3 * groups, CHANNELS)
        by_group = (seen[:, 0] // own).long().bincount(minlength=groups)
        assert by_group.tolist() == [own // 3] * groups
    everything = torch.cat(turns)[:, 0].sort().values
    assert len(everything.unique()) == len(everything)
    later = torch.cat([layer.weight_at(torch.tensor(turn))[:, 0] for turn in range(3, own)])
    assert set(range(outputs)) <= {*everything.tolist(), *later.tolist()}


def test_the_losses_of_all_turns_are_the_loss_of_the_layer() -> None:
    x, weight, tau = normal(0, 6, CHANNELS)[:, None, :, None], normal(1, 1024, CHANNELS), normal(2, CHANNELS).exp()
    ranges = ChannelRanges.of(x[:, 0])

    def of(layer: ScaledLayer, turn: int) -> Tensor:
        return scaling_losses({"x": x}, [layer], ranges, tau, ACTIVATION, torch.tensor(turn))

    found = torch.stack([of(ScaledLayer("x", weight, 1, WEIGHT), turn) for turn in range(4)]).mean(0)

    parts = [of(ScaledLayer("x", part, 1, WEIGHT), 0) for part in weight.split(256)]
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


def test_the_gradient_of_log_tau_points_downhill() -> None:
    x, layer = outlier_layer()
    log_tau = torch.zeros(CHANNELS, requires_grad=True)

    before = losses(x, [layer], log_tau.exp()).mean()
    before.backward()

    gradient = log_tau.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[3] < 0  # the huge channel wants a larger tau
    with torch.no_grad():
        # Rounding makes the loss rough; a step of 0.3 in log tau is long enough to see its trend.
        direction = -gradient / gradient.norm()
        downhill, uphill = (losses(x, [layer], (sign * 0.3 * direction).exp()).mean() for sign in (1, -1))
    assert downhill < before.detach() < uphill


def draw_from(x: Tensor, timesteps: int, seed: int = 0) -> Callable[[], Batch]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        picks = torch.randint(len(x), (16,), generator=generator)
        return {"x": x[picks][:, None, :, None], "steps": picks % timesteps}

    return draw


@pytest.mark.parametrize("kind", list(Weighting))
def test_learning_lowers_the_loss_under_a_huge_channel_and_keeps_tau_positive(kind: Weighting) -> None:
    x, layer = outlier_layer()
    start = torch.ones(CHANNELS)

    tau = learn(Draw(draw_from(x, 4)), layer, x, TimestepWeights(kind, 4), ScalingSchedule(200, 16, 5e-2), start)

    before, after = (float(losses(x, [layer], each).mean()) for each in (start, tau))
    # At tau = 1 the step of the input is a hundred times too large for seven of eight channels.
    assert after < 0.7 * before
    assert (tau > 0).all()
    assert tau.isfinite().all()
    assert tau[3] > 3 * tau[torch.arange(CHANNELS) != 3].max()
    assert not tau.requires_grad


def test_tau_stays_positive_under_a_learning_rate_that_would_overshoot_zero() -> None:
    x, layer = outlier_layer()
    weights = TimestepWeights(Weighting.UNIFORM, 4)

    tau = learn(Draw(draw_from(x, 4)), layer, x, weights, ScalingSchedule(20, 16, 1.0), torch.ones(CHANNELS))

    assert (tau > 0).all()
    assert tau.max() / tau.min() > 10  # it did move far


def test_learning_starts_where_it_is_told_and_depends_on_the_draws_alone() -> None:
    x, layer = outlier_layer()
    start = normal(7, CHANNELS).exp()

    def found(iterations: int, seed: int) -> Tensor:
        weights, schedule = TimestepWeights(Weighting.ADAPTIVE, 4), ScalingSchedule(iterations, 16, 1e-2)
        return learn(Draw(draw_from(x, 4, seed)), layer, x, weights, schedule, start)

    torch.testing.assert_close(found(0, 0), start)
    assert torch.equal(found(5, 0), found(5, 0))
    assert not torch.equal(found(5, 0), found(5, 1))


def test_learning_stops_early_when_the_loss_has_settled() -> None:
    x, layer = outlier_layer()
    draws = []

    def draw() -> Batch:  # always the same batch, and a learning rate too small to matter
        draws.append(1)
        return {"x": x[:, None, :, None], "steps": torch.arange(len(x)) % 4}

    schedule = ScalingSchedule(500, 64, 1e-9, patience=10)
    learn(Draw(draw), layer, x, TimestepWeights(Weighting.UNIFORM, 4), schedule, torch.ones(CHANNELS))

    assert len(draws) == 20


def test_a_history_has_settled_when_its_last_losses_are_no_better() -> None:
    falling, flat = [1.0 - 0.01 * i for i in range(40)], [1.0] * 40

    assert not has_settled(falling, 10)
    assert has_settled(flat, 10)
    assert has_settled([*falling, *[falling[-1]] * 20], 10)
    assert has_settled([1.0] * 10 + [0.9995] * 10, 10)  # 0.05 % better is no better
    assert not has_settled([1.0] * 10 + [0.998] * 10, 10)


def test_a_history_never_settles_without_patience_or_before_twice_as_many_losses() -> None:
    assert not has_settled([1.0] * 1000, 0)
    assert not has_settled([1.0] * 19, 10)
    assert has_settled([1.0] * 20, 10)


# -- SmoothQuant ----------------------------------------------------------------------------------


def test_smooth_scaling_is_the_closed_form_over_all_readers() -> None:
    largest = torch.tensor([1.0, 100.0, 4.0])
    weights = [torch.tensor([[1.0, -0.5, 2.0], [-4.0, 0.25, 1.0]]), torch.tensor([[0.5, 0.5, -16.0]])]

    tau = smooth_scaling(largest, weights)

    # sqrt(max |X| / max |W|) with max |W| = 4, 0.5, 16.
    torch.testing.assert_close(tau, (largest / torch.tensor([4.0, 0.5, 16.0])).sqrt())


def test_smooth_scaling_levels_inputs_and_weights() -> None:
    x, weight = normal(0, 50, 6) * torch.logspace(-2, 2, 6), normal(1, 4, 6, 3, 3)
    largest = x.abs().amax(0)

    tau = smooth_scaling(largest, [weight])

    scaled_weight = scale_input_channels(weight, tau).abs().amax((0, 2, 3))
    torch.testing.assert_close(largest / tau, scaled_weight)


def test_smooth_scaling_survives_dead_channels() -> None:
    tau = smooth_scaling(torch.tensor([0.0, 1.0]), [torch.tensor([[1.0, 0.0]])])

    assert (tau > 0).all()
    assert tau.isfinite().all()


@pytest.mark.parametrize("groups", [2, 4])
def test_smooth_scaling_of_a_grouped_convolution_has_a_factor_per_input_channel(groups: int) -> None:
    weight, largest = normal(0, 8, 4 // groups, 3, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])
    of_group = weight.reshape(groups, 8 // groups, 4 // groups, 9)
    expected = (largest / of_group.abs().amax((1, 3)).flatten()).sqrt()

    tau = smooth_scaling(largest, [weight])

    torch.testing.assert_close(tau, expected)
