import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.rounding import (
    beta_at,
    hard_codes,
    rectified_sigmoid,
    rounding_logits,
    rounding_regularizer,
    sides,
    soft_weight,
    undecided,
)
from tfmq_export.ptq.weights import per_output, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec

# Logits beyond this are decided: 1.2 sigmoid(a) - 0.1 leaves 0..1 at |a| = log 11 = 2.398.
DECIDED = 2.5


def layer(bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, QuantSpec]:
    """A weight, its scale ready to broadcast, and its grid."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    spec = QuantSpec(bits, axis=0)
    return weight, per_output(search_weight_scale(weight, spec), weight), spec


def nearest(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    return (weight / scale).round().clamp(spec.qmin, spec.qmax)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_h_starts_at_the_fractional_part(bits: int) -> None:
    weight, scale, spec = layer(bits)
    steps = weight / scale
    codes = nearest(weight, scale, spec)
    inside = (steps >= spec.qmin) & (steps <= spec.qmax)

    h = rectified_sigmoid(rounding_logits(weight, scale, codes))

    # Sigmoid and logarithm in fp32, one after the other.
    torch.testing.assert_close(h[inside], (steps - steps.floor())[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_learning_starts_on_the_way_from_the_code_to_the_value(pull: float) -> None:
    weight, scale = torch.tensor([2.3, 2.3, -1.7, 2.3, 2.3]), torch.tensor(1.0)
    codes = torch.tensor([2.0, 3.0, -2.0, 1.0, 4.0])  # two of them further away than a step
    spec = QuantSpec(4, axis=0)

    down, up = sides(weight, scale, codes, spec)
    soft = soft_weight(down, up, rounding_logits(weight, scale, codes, pull))

    assert down.tolist() == [2, 2, -2, 1, 3]
    assert up.tolist() == [3, 3, -1, 2, 4]
    expected = codes + (pull * (weight - codes)).clamp(-0.5, 0.5)
    torch.testing.assert_close(soft, expected, rtol=0, atol=2e-6)
    assert torch.equal(hard_codes(down, up, rounding_logits(weight, scale, codes, pull)), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_soft_weight_starts_as_the_float_weight_inside_the_grid(bits: int) -> None:
    weight, scale, spec = layer(bits)
    steps = weight / scale
    inside = (steps >= spec.qmin) & (steps <= spec.qmax)

    codes = nearest(weight, scale, spec)
    down, up = sides(weight, scale, codes, spec)
    soft = soft_weight(down * scale, up * scale, rounding_logits(weight, scale, codes))

    # A millionth of a step is what the logits cost, and at most 128 steps of fp32 come on top.
    assert ((soft - weight).abs() / scale)[inside].max() < 2e-5
    assert torch.equal(soft[~inside], (steps.clamp(spec.qmin, spec.qmax) * scale)[~inside])
    assert inside.any()
    if bits < 8:
        assert not inside.all()  # the scale search clips; otherwise the line above tests nothing


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_hard_rounding_decides_every_weight_for_floor_or_ceil_inside_the_grid(bits: int, spread: float) -> None:
    weight, scale, spec = layer(bits)
    floor = (weight / scale).floor()
    down, up = sides(weight, scale, nearest(weight, scale, spec), spec)
    logits = spread * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    codes = hard_codes(down, up, logits)

    assert torch.equal(down, floor.clamp(spec.qmin, spec.qmax))
    assert torch.equal(up, (floor + 1).clamp(spec.qmin, spec.qmax))
    assert torch.equal(codes, codes.round())
    assert ((codes == down) | (codes == up)).all()
    assert torch.equal(codes, torch.where(logits >= 0, up, down))
    assert (codes[down != up] == down[down != up]).any()
    assert (codes[down != up] == up[down != up]).any()


def test_untouched_logits_round_to_nearest() -> None:
    weight, scale, spec = layer(4)
    steps = weight / scale

    start = nearest(weight, scale, spec)
    codes = hard_codes(*sides(weight, scale, start, spec), rounding_logits(weight, scale, start))

    assert torch.equal(codes, steps.round().clamp(spec.qmin, spec.qmax))


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_the_regularizer_is_zero_exactly_where_every_weight_is_decided(beta: float) -> None:
    decided = torch.tensor([-DECIDED, DECIDED, -10.0, 10.0])

    assert rounding_regularizer(decided, beta).item() == 0
    assert undecided(decided).item() == 0
    for doubt in (-2.0, -0.5, 0.0, 0.5, 2.0):
        one_in_doubt = torch.cat((decided, torch.tensor([doubt])))
        assert rounding_regularizer(one_in_doubt, beta).item() > 0
        assert undecided(one_in_doubt).item() == pytest.approx(1 / 5)


def test_the_regularizer_is_the_papers_formula() -> None:
    logits = torch.linspace(-2, 2, 9, dtype=torch.float64)
    h = 1.2 / (1 + torch.exp(-logits)) - 0.1

    value = rounding_regularizer(logits, 3.5)

    torch.testing.assert_close(value, (1 - (2 * h - 1).abs() ** 3.5).sum())
    assert rounding_regularizer(torch.zeros(7), 20.0).item() == 7  # h = 1/2 costs most: one each


# Away from h = 1/2, where |2h - 1| has its corner, and from |a| = log 11, where h is clipped.
LOGITS = torch.tensor([-2.2, -1.0, -0.3, 0.4, 1.5, 2.1, -4.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_the_regularizers_gradient_is_its_slope(beta: float) -> None:
    assert torch.autograd.gradcheck(lambda a: rounding_regularizer(a, beta), LOGITS.clone().requires_grad_())


def test_the_soft_weights_gradient_is_its_slope() -> None:
    low = 0.37 * torch.tensor([-8.0, -3.0, 0.0, 6.0, 2.0, -1.0, 5.0, 3.0], dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda a: soft_weight(low, low + 0.37, a), LOGITS.clone().requires_grad_())


def test_weights_outside_the_grid_pull_at_no_logit() -> None:
    logits, weight = torch.zeros(3, requires_grad=True), torch.tensor([-20.0, 2.3, 20.0])

    one, spec = torch.tensor(1.0), QuantSpec(4, axis=0)
    soft_weight(*sides(weight, one, nearest(weight, one, spec), spec), logits).sum().backward()

    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [False, True, False]


def test_the_regularizer_pushes_towards_the_nearer_side() -> None:
    logits = torch.tensor([-1.0, 1.0], requires_grad=True)

    rounding_regularizer(logits, 20.0).backward()

    assert logits.grad is not None
    assert logits.grad[0] > 0  # descending makes it smaller still
    assert logits.grad[1] < 0


def test_beta_is_off_at_first_and_falls_linearly_from_twenty_to_two() -> None:
    assert [beta_at(progress) for progress in (0.0, 0.1, 0.1999)] == [None, None, None]
    assert beta_at(0.2) == pytest.approx(20)
    assert beta_at(0.4) == pytest.approx(15.5)
    assert beta_at(0.6) == pytest.approx(11)
    assert beta_at(1.0) == pytest.approx(2)
