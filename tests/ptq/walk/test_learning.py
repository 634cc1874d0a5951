import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.walk.learning import Batch, Draw, GradientStep, adam, anneal


def draws(device: str, shapes: Sequence[int], seed: int = 0) -> Callable[[], Batch]:
    """Batches of so many rows, in turn."""
    generator, left = torch.Generator().manual_seed(seed), list(shapes)

    def draw() -> Batch:
        x = torch.randn(left.pop(0), 8, generator=generator)
        return {"x": x.to(device), "y": (x @ torch.arange(8.0)).to(device)}

    return draw


def fit(device: str, shapes: Sequence[int]) -> tuple[Tensor, list[float]]:
    """A linear fit; the parameters and what the loss saw."""
    weight = torch.zeros(8, device=device, requires_grad=True)
    optimizer, latest, seen = adam([weight], 0.1), torch.zeros((), device=device), []

    def loss(batch: Batch) -> Tensor:
        value = (batch["x"] @ weight - batch["y"]).square().mean()
        latest.copy_(value.detach())
        return value

    step = GradientStep(Draw(draws(device, shapes)), loss, [optimizer])
    for done in range(len(shapes)):
        anneal(optimizer, 0.1, done / len(shapes))
        step()
        seen.append(float(latest))
    return weight.detach().cpu(), seen


def test_steps_are_those_of_a_plain_loop() -> None:
    shapes = [16] * 20
    weight = torch.zeros(8, requires_grad=True)
    optimizer, draw = torch.optim.Adam([weight], lr=0.1), draws("cpu", shapes)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shapes))
    for _ in shapes:
        batch = draw()
        optimizer.zero_grad()
        (batch["x"] @ weight - batch["y"]).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        cosine.step()

    # The cosine in closed form is the recursive one to a few bits.
    torch.testing.assert_close(fit("cpu", shapes)[0], weight.detach(), rtol=1e-6, atol=1e-6)


def test_several_optimizers_take_the_same_step() -> None:
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    step = GradientStep(Draw(dict), lambda batch: (x.square() + 2 * y).sum(), [adam([x], 0.1), adam([y], 0.2)])

    step()

    torch.testing.assert_close(x.detach(), torch.full((3,), 0.9))  # Adam's first step is its learning rate
    torch.testing.assert_close(y.detach(), torch.full((3,), 0.8))


def fit_rows(device: str, *, at_hand: bool) -> Tensor:
    """A linear fit to random rows of one table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator).to(device)
    weight = torch.zeros(8, device=device, requires_grad=True)
    draw = Draw.rows(
        lambda: torch.randint(64, (16,), generator=generator),
        lambda rows: {"x": x[rows], "y": x[rows].sum(1)},
        x.device if at_hand else None,
    )
    step = GradientStep(draw, lambda batch: (batch["x"] @ weight - batch["y"]).square().mean(), [adam([weight], 0.1)])
    for _ in range(30):
        step()
    return weight.detach().cpu()


def test_rows_are_read_in_the_step_or_before_it() -> None:
    inside, before = (fit_rows("cpu", at_hand=at_hand) for at_hand in (True, False))

    assert torch.equal(inside, before)
    assert (inside - 1).abs().max() < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("at_hand", [True, False], ids=["in the recording", "before it"])
def test_a_recorded_step_reads_other_rows_each_time(*, at_hand: bool) -> None:
    torch.testing.assert_close(
        fit_rows("cuda", at_hand=at_hand), fit_rows("cpu", at_hand=at_hand), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_learning_rate_falls_on_a_cosine(progress: float) -> None:
    optimizer = adam([torch.zeros(1, requires_grad=True)], 1.0)

    anneal(optimizer, 0.2, progress)

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * progress)))


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [[16] * 30, [16] * 8 + [5] + [16] * 8], ids=["one shape", "a smaller batch"])
def test_recorded_steps_learn_what_plain_ones_do(shapes: list[int]) -> None:
    plain, seen = fit("cpu", shapes)
    replayed, seen_on_gpu = fit("cuda", shapes)

    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen_on_gpu, seen, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.ones(4, device="cuda", requires_grad=True)

    def waits(batch: Batch) -> Tensor:
        return weight.square().sum() * (1 if float(weight.detach().sum()) > 0 else 2)

    step = GradientStep(Draw(dict), waits, [adam([weight], 0.1)])
    for _ in range(8):
        step()

    assert "cannot be recorded" in caplog.text
    torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), 0.22), atol=0.05, rtol=0)
