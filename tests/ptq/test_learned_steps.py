from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.learned_steps import LearnedGrid, learn_steps
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.recipe.grid import QuantSpec

SPEC = QuantSpec(4, signed=False)
ALL = torch.tensor([0])


def grid(scale: float, zero_point: float, dtype: torch.dtype = torch.float32) -> Grid:
    return Grid(SPEC, torch.tensor(scale, dtype=dtype), torch.tensor(zero_point, dtype=dtype))


def sample() -> Tensor:
    return torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))


def error(on: Grid, x: Tensor) -> float:
    return float((on.lay_over(x, ALL) - x).square().mean())


def test_learning_starts_from_the_grid() -> None:
    start = grid(0.37, 5)

    learned = LearnedGrid(start)

    for now in (learned.soft(), learned.hard()):
        # The logarithm and back, in fp32.
        torch.testing.assert_close(now.scale, start.scale)
        assert now.zero_point == start.zero_point
    assert not learned.hard().scale.requires_grad
    assert not learned.hard().zero_point.requires_grad


def test_soft_and_hard_grids_compute_the_same() -> None:
    learned, x = LearnedGrid(grid(0.31, 7)), sample()
    with torch.no_grad():
        learned.log_scale.add_(0.1)
        learned.zero_point.add_(0.6)

    soft, hard = learned.soft().lay_softly(x, ALL), learned.hard().lay_over(x, ALL)

    # x + (round(x) - x) is not quite round(x) in fp32.
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-5)
    assert learned.hard().zero_point == 8


def test_a_grid_that_stands_still_passes_the_gradient_where_nothing_is_clipped() -> None:
    start, weights = grid(0.21, 5), torch.linspace(-1, 1, 4000)
    x = (1.5 * sample()).requires_grad_()  # clipped on both sides
    edges = torch.tensor([[-5 * 0.21, 10 * 0.21, -5.4 * 0.21, 10.4 * 0.21, 10.6 * 0.21]], requires_grad=True)

    still = start.lay_softly(x, ALL)
    (found,) = torch.autograd.grad((still * weights).sum(), x)
    learned = replace(start, scale=start.scale.clone().requires_grad_()).lay_softly(x, ALL)
    (wanted,) = torch.autograd.grad((learned * weights).sum(), x)
    (at_edges,) = torch.autograd.grad(start.lay_softly(edges, ALL).sum(), edges)

    assert torch.equal(still, start.lay_over(x, ALL))
    torch.testing.assert_close(found, wanted)
    assert 0 < (found == 0).float().mean() < 0.5
    assert at_edges.tolist() == [[1, 1, 1, 1, 0]]  # what rounds to the last code is inside


@pytest.mark.parametrize("scale", [0.5, 0.21])
def test_the_scales_gradient_is_its_slope_between_rounding_boundaries(scale: float) -> None:
    # The straight-through gradient of y = s (clamp(round(x / s) + z) - z) is round(x / s) - x / s inside the grid. A
    # clipped value follows its end, so there the slope is the true one.
    start = grid(scale, 5, torch.float64)
    x = torch.tensor([[-30.0, 30.0]], dtype=torch.float64)  # both clipped, far from any boundary
    learned = LearnedGrid(start)
    learned.soft().lay_softly(x, ALL).square().sum().backward()

    def loss(log_scale: Tensor) -> Tensor:
        moved = Grid(SPEC, log_scale.exp(), start.zero_point)
        return moved.lay_over(x, ALL).square().sum()

    step = 1e-6
    slope = (loss(start.scale.log() + step) - loss(start.scale.log() - step)) / (2 * step)
    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad.item() == pytest.approx(float(slope), rel=1e-6)  # of a central difference


def test_inside_the_grid_the_gradient_is_the_rounding_residual() -> None:
    learned = LearnedGrid(grid(0.5, 5, torch.float64))
    x = torch.tensor([[0.61]], dtype=torch.float64)  # 1.22 steps

    learned.soft().lay_softly(x, ALL).sum().backward()

    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad.item() == pytest.approx(0.5 * (1 - 1.22))  # s (round(v) - v)


def test_the_zero_points_gradient_is_its_slope_where_values_clip() -> None:
    learned = LearnedGrid(grid(0.5, 5))

    # Moving z by one moves a clipped end by one step the other way, and leaves the inside where it is.
    learned.soft().lay_softly(torch.tensor([[100.0]]), ALL).sum().backward()
    assert learned.zero_point.grad is not None
    assert learned.zero_point.grad.item() == pytest.approx(-0.5)
    learned.zero_point.grad = None
    learned.soft().lay_softly(torch.tensor([[0.61]]), ALL).sum().backward()
    assert learned.zero_point.grad.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("scale", "zero_point"), [(2.0, 7), (0.05, 7), (0.45, 1)])
def test_learning_lowers_the_error_of_a_badly_laid_grid(scale: float, zero_point: float) -> None:
    x, start = sample(), grid(scale, zero_point)

    def loss(grids: Mapping[str, Grid], batch: Batch) -> Tensor:
        return (grids["x"].lay_softly(x, ALL) - x).square().mean()

    learned = learn_steps(Draw(dict), loss, {"x": start}, 200, 2e-2)["x"]

    # Too wide, too narrow, too far up: each costs at least twice what the best grid does.
    assert error(learned, x) < 0.5 * error(start, x)
    learned.to_qparams()


def test_the_scale_stays_positive_under_steps_that_would_overshoot_zero() -> None:
    x = sample()

    def loss(grids: Mapping[str, Grid], batch: Batch) -> Tensor:
        return (grids["x"].lay_softly(x, ALL) - 0 * x).square().mean()  # wants a grid of no width at all

    learned = learn_steps(Draw(dict), loss, {"x": grid(0.4, 7)}, 30, 1.0)["x"]

    assert 0 < learned.scale < 1e-3
    assert SPEC.qmin <= learned.zero_point <= SPEC.qmax
    assert learned.zero_point == learned.zero_point.round()


def test_zero_points_stay_inside_the_grid() -> None:
    x = -sample().abs() * 10  # far below what the zero point can reach

    def loss(grids: Mapping[str, Grid], batch: Batch) -> Tensor:
        return (grids["x"].lay_softly(x, ALL) - x).square().mean()

    learned = learn_steps(Draw(dict), loss, {"x": grid(0.1, 14)}, 60, 2e-2)["x"]

    assert 14 < learned.zero_point <= SPEC.qmax
    learned.to_qparams()


def test_a_finite_set_learns_each_timestep_on_its_own_rows() -> None:
    steps = torch.tensor([0, 2])  # timestep 1 is never drawn
    x = torch.randn(2, 2000, generator=torch.Generator().manual_seed(1))
    start = Grid(SPEC, torch.tensor([2.0, 2.0, 2.0]), torch.tensor([7.0, 7.0, 7.0]))

    def loss(grids: Mapping[str, Grid], batch: Batch) -> Tensor:
        return (grids["x"].lay_softly(x, steps) - x).square().mean()

    learned = learn_steps(Draw(dict), loss, {"x": start}, 100, 2e-2)["x"]

    assert (learned.scale[[0, 2]] < 1.0).all()
    torch.testing.assert_close(learned.scale[1], start.scale[1])


def test_grids_that_no_loss_depends_on_stay() -> None:
    start = {"x": grid(2.0, 7), "y": grid(0.3, 2)}
    x = sample()

    learned = learn_steps(
        Draw(dict), lambda grids, batch: (grids["x"].lay_softly(x, ALL) - x).square().mean(), start, 20, 2e-2
    )

    torch.testing.assert_close(learned["y"].scale, start["y"].scale)
    assert learned["y"].zero_point == 2
    assert learned["x"].scale < 2.0
