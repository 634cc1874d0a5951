from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.learning import Batch, GradientStep, adam


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

    step = GradientStep(draws(device, shapes), loss, [optimizer])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shapes))
    for _ in shapes:
        step()
        cosine.step()
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

    assert torch.equal(fit("cpu", shapes)[0], weight.detach())


def test_several_optimizers_take_the_same_step() -> None:
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    step = GradientStep(dict, lambda batch: (x.square() + 2 * y).sum(), [adam([x], 0.1), adam([y], 0.2)])

    step()

    torch.testing.assert_close(x.detach(), torch.full((3,), 0.9))  # Adam's first step is its learning rate
    torch.testing.assert_close(y.detach(), torch.full((3,), 0.8))


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

    step = GradientStep(dict, waits, [adam([weight], 0.1)])
    for _ in range(8):
        step()

    assert "cannot be recorded" in caplog.text
    torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), 0.22), atol=0.05, rtol=0)
