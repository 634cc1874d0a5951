import pytest
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.proof.plan import FEW_IMAGES, FEWEST, STEPPING, TOGETHER, USUAL_IMAGES, Cost, measured_cost, plan_of

SMALL = Cost(row=0.01, rows=1, calls=50)
STABLE_DIFFUSION = Cost(row=6, rows=2, calls=20)
"""On two cores."""


def test_a_small_model_is_proven_in_full() -> None:
    plan = plan_of(SMALL, None, 1800)

    assert (plan.images, plan.timesteps, plan.few) == (USUAL_IMAGES, SMALL.calls, FEW_IMAGES)


def test_a_large_model_is_proven_within_its_budget() -> None:
    plan = plan_of(STABLE_DIFFUSION, None, 1800)

    assert plan.images == plan.few == 1
    assert FEWEST <= plan.timesteps < STABLE_DIFFUSION.calls
    assert plan.seconds <= 1800


@pytest.mark.parametrize("cost", [SMALL, STABLE_DIFFUSION, Cost(row=0.2, rows=2, calls=50)])
def test_more_time_never_proves_less(cost: Cost) -> None:
    plans = [plan_of(cost, None, seconds) for seconds in (10, 100, 1000, 10_000, 100_000)]

    assert [plan.images for plan in plans] == sorted(plan.images for plan in plans)
    assert (plans[-1].images, plans[-1].timesteps) == (USUAL_IMAGES, cost.calls)


def test_what_was_asked_for_is_drawn_whatever_it_takes() -> None:
    plan = plan_of(STABLE_DIFFUSION, 3, 1)

    assert (plan.images, plan.timesteps) == (3, FEWEST)


def test_the_turns_that_time_a_call_are_counted() -> None:
    small, large = (Cost(row, rows=1, calls=1).stages(1, 1)[STEPPING] for row in (0.01, 100.0))

    drawn = 0.6 * (1 + 2 * (1 + 3))  # one image, and both halves at one timestep and three extremes
    assert small == pytest.approx(0.01 * (drawn + 2 * 1.6 * (2 + 7)))
    assert large == pytest.approx(100 * (drawn + 2 * 1.6 * (2 + 1)))  # no round begins after ten seconds


def test_a_schedule_of_one_step_is_compared_whole() -> None:
    assert plan_of(Cost(row=100, rows=1, calls=1), None, 1).timesteps == 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.batches: list[int] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.batches.append(len(sample))
        sample = sample.view(-1, *sample.shape[2:]).view_as(sample)  # of contiguous tensors only, as HunyuanDiT 1.2
        return self.conv(sample) * timestep.reshape(-1, 1, 1, 1)


def test_the_cost_is_that_of_one_row() -> None:
    net = Net()

    cost = measured_cost(probe(net, timesteps=[5, 3, 1]))

    assert net.batches == [1, 1, TOGETHER, TOGETHER]  # the first of each is slow
    assert cost.row > 0
    assert (cost.rows, cost.calls) == (1, 3)
