from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tfmq_export.capture.dependences import Operation
from tfmq_export.ptq.reconstruct import learn_rounding
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.walk.effort import RoundingSchedule
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.ptq.weights import nearest_codes, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec

WIDTH = 16
SCHEDULE = RoundingSchedule(600, 32, 2e-2)


def silent(done: int, total: int) -> None:
    pass


def draft(name: str, bits: int, seed: int) -> Draft:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) / WIDTH**0.5
    op = Operation(name, name, "linear", "x", f"{name}.weight", None, weight.numel(), frozenset({"sample"}))
    spec = QuantSpec(bits, axis=0)
    scale = search_weight_scale(weight, spec)
    codes = nearest_codes(weight, scale, spec)
    return Draft(op, weight, spec, QuantSpec(8, signed=False), None, scale=scale, codes=codes)


def drafts(bits: int) -> tuple[Draft, Draft]:
    return draft("first", bits, 1), draft("second", bits, 2)


def block(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return x + functional.linear(functional.silu(functional.linear(x, weights["first"])), weights["second"])


def inputs(rows: int, seed: int) -> Tensor:
    """Correlated channels, as features are: that is what learned rounding uses."""
    mixing = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator) @ mixing + 0.1 * torch.randn(rows, WIDTH, generator=generator)


def full_precision(given: Sequence[Draft]) -> dict[str, Tensor]:
    return {each.op.name: each.weight for each in given}


def learned(given: Sequence[Draft], schedule: RoundingSchedule = SCHEDULE, seed: int = 0) -> tuple[Draft, ...]:
    x, generator = inputs(512, 3), torch.Generator().manual_seed(seed)
    target = block(x, full_precision(given))

    def draw() -> Batch:
        picks = torch.randint(len(x), (schedule.batch,), generator=generator)
        return {"x": x[picks], "target": target[picks]}

    def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return (block(batch["x"], weights) - batch["target"]).square().sum(1).mean()

    return learn_rounding(given, Draw(draw), loss, schedule, silent)


def error(given: Sequence[Draft], x: Tensor) -> float:
    rounded = {each.op.name: each.rounded for each in given}
    return float((block(x, rounded) - block(x, full_precision(given))).square().mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_learned_rounding_beats_nearest_on_inputs_it_never_saw(bits: int) -> None:
    nearest, held_out = drafts(bits), inputs(512, 4)

    found = learned(nearest)

    # Measured: to a fifth or less. Half leaves room for other BLAS libraries.
    assert error(found, held_out) < 0.5 * error(nearest, held_out)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("iterations", [5, 150])  # cut short, and not
def test_finished_codes_are_integers_next_to_the_weight_on_the_grid(bits: int, iterations: int) -> None:
    found = learned(drafts(bits), RoundingSchedule(iterations, 32, 2e-2))

    for each in found:
        assert each.codes is not None
        assert each.scale is not None
        spec, steps = each.weight_spec, each.weight / each.scale[:, None]
        assert torch.equal(each.codes, each.codes.round())
        assert each.codes.min() >= spec.qmin
        assert each.codes.max() <= spec.qmax
        below, above = steps.floor().clamp(spec.qmin, spec.qmax), (steps.floor() + 1).clamp(spec.qmin, spec.qmax)
        assert ((each.codes == below) | (each.codes == above)).all()
        assert not each.codes.requires_grad


def test_some_weights_are_rounded_away_from_nearest() -> None:
    nearest = drafts(4)

    found = learned(nearest)

    for before, after in zip(nearest, found, strict=True):
        assert before.codes is not None
        assert after.codes is not None
        assert 0.01 < float((before.codes != after.codes).double().mean()) < 0.5


def test_nothing_but_the_codes_is_changed() -> None:
    before = tuple(replace(each, tau=torch.full((WIDTH,), 2.0)) for each in drafts(4))
    before = tuple(replace(each, scale=search_weight_scale(each.weight, each.weight_spec)) for each in before)

    after = learned(before, RoundingSchedule(10, 32, 1e-2))

    for old, new in zip(before, after, strict=True):
        assert new.op is old.op
        assert new.plain is old.plain
        assert new.scale is old.scale
        assert new.tau is old.tau
        # Codes are of tau W: twice the weight on a grid twice as wide.
        assert new.codes is not None
        torch.testing.assert_close(new.rounded, 2 * old.plain, rtol=0, atol=float(old.scale.max()))  # one step


def test_the_same_draws_give_the_same_codes() -> None:
    schedule = RoundingSchedule(100, 32, 2e-2)

    first, again, other = (learned(drafts(3), schedule, seed) for seed in (0, 0, 1))

    codes = [torch.stack([each.codes for each in result if each.codes is not None]) for result in (first, again, other)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("pull", [0.5, 1.0])
def test_codes_off_the_nearest_are_kept_where_the_loss_says_nothing(pull: float) -> None:
    nearest = drafts(4)
    given = []
    for each in nearest:
        assert each.codes is not None
        assert each.scale is not None
        aside = torch.where(each.weight / each.scale[:, None] > each.codes, -1, 1)  # away from the value
        given.append(replace(each, codes=(each.codes + aside).clamp(each.weight_spec.qmin, each.weight_spec.qmax)))

    found = learn_rounding(
        given,
        Draw(dict),
        lambda weights, batch: sum((weight * 0).sum() for weight in weights.values()),
        RoundingSchedule(50, 1, 2e-2),
        silent,
        pull,
    )

    for before, after in zip(given, found, strict=True):
        assert before.codes is not None
        assert after.codes is not None
        assert torch.equal(after.codes, before.codes)


def test_progress_is_told_and_learning_ends_once_every_weight_is_decided() -> None:
    steps: list[tuple[int, int]] = []
    given = drafts(4)

    # A loss that is flat: the regulariser alone decides, quickly.
    learn_rounding(
        given,
        Draw(dict),
        lambda weights, batch: sum((weight * 0).sum() for weight in weights.values()),
        RoundingSchedule(4000, 1, 1e-1),
        lambda done, total: steps.append((done, total)),
    )

    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, total in steps} == {4000}
    assert 0.2 * 4000 < len(steps) < 4000
