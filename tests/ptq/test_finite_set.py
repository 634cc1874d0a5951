import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.finite_set import calibrate_finite_set
from tfmq_export.ptq.observers import ESTIMATORS, Observation, activation_grid
from tfmq_export.recipe.grid import QuantSpec

SPEC = QuantSpec(8, signed=False)


def seen(values: Tensor) -> Observation:
    return Observation(float(values.min()), float(values.max()), values)


def schedule(timesteps: int = 5) -> list[Observation | None]:
    """An activation that grows as the image comes out of the noise."""
    generator = torch.Generator().manual_seed(0)
    return [seen(torch.randn(400, generator=generator) * 3**step + step) for step in range(timesteps)]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_each_timestep_gets_the_grid_it_would_get_alone(estimator: str) -> None:
    observations = schedule()

    together = calibrate_finite_set(observations, SPEC, estimator, per_timestep=True)

    assert together.scale.shape == together.zero_point.shape == (5,)
    for step, observation in enumerate(observations):
        assert observation is not None
        alone = activation_grid(observation, SPEC, estimator)
        assert together.scale[step] == alone.scale
        assert together.zero_point[step] == alone.zero_point


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_changing_one_timesteps_data_changes_only_its_grid(estimator: str) -> None:
    observations, changed = schedule(), schedule()
    changed[2] = seen(torch.rand(400, generator=torch.Generator().manual_seed(1)) * 1000)

    before, after = (calibrate_finite_set(data, SPEC, estimator, per_timestep=True) for data in (observations, changed))

    assert (before.scale != after.scale).tolist() == [False, False, True, False, False]
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(before.zero_point[others], after.zero_point[others])


@pytest.mark.parametrize("missing", [0, 3, 4])
def test_a_timestep_that_was_never_seen_is_an_error_and_named(missing: int) -> None:
    observations = schedule()
    observations[missing] = None

    with pytest.raises(CalibrationError, match=f"timestep {missing} "):
        calibrate_finite_set(observations, SPEC, "minmax", per_timestep=True)


def test_one_grid_for_all_timesteps_covers_every_one() -> None:
    observations = schedule()

    merged = calibrate_finite_set(observations, SPEC, "minmax", per_timestep=False)

    assert merged.scale.shape == ()
    low, high = ((end - merged.zero_point) * merged.scale for end in (SPEC.qmin, SPEC.qmax))
    for observation in observations:
        assert observation is not None
        # The zero point is rounded to an integer: half a step at either end.
        assert low - 0.5 * merged.scale <= observation.low
        assert observation.high <= high + 0.5 * merged.scale


def test_a_finite_set_is_finer_than_one_grid_where_ranges_differ() -> None:
    observations = schedule()
    every = calibrate_finite_set(observations, SPEC, "minmax", per_timestep=True)
    one = calibrate_finite_set(observations, SPEC, "minmax", per_timestep=False)

    errors = []
    for grid in (every, one):
        laid = [grid.lay_over(o.values[None], torch.tensor([step])) for step, o in enumerate(observations) if o]
        errors.append([float((y[0] - o.values).square().mean()) for y, o in zip(laid, observations, strict=True) if o])

    # The smallest of five ranges is 80 times smaller than the largest; so are its steps, and errors go with squares.
    assert errors[0][0] < errors[1][0] / 100


def test_rows_are_laid_on_the_grid_of_their_own_timestep() -> None:
    observations = schedule()
    grid = calibrate_finite_set(observations, SPEC, "minmax", per_timestep=True)
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2)) * 20
    steps = torch.tensor([4, 0, 2])

    together = grid.lay_over(x, steps)

    for row, step in enumerate(steps):
        assert torch.equal(together[row : row + 1], grid.lay_over(x[row : row + 1], step[None]))
    assert not torch.equal(together[:1], grid.lay_over(x[:1], torch.tensor([3])))


def test_several_rows_per_sample_share_the_samples_timestep() -> None:
    grid = calibrate_finite_set(schedule(), SPEC, "minmax", per_timestep=True)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3)) * 20  # two samples, three rows each
    steps = torch.tensor([4, 1])

    flat = grid.lay_over(x.flatten(0, 1), steps)

    assert torch.equal(flat.reshape(x.shape), grid.lay_over(x, steps))


ends = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@settings(max_examples=25, deadline=None)
@given(low=ends, high=ends, bits=st.sampled_from([4, 6, 8]), codes=st.sampled_from([1, 16]), seed=st.integers(0, 99))
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_zero_point_is_inside_the_grid_and_zero_is_exact(
    estimator: str, low: float, high: float, bits: int, codes: int, seed: int
) -> None:
    spec = QuantSpec(bits, signed=False, codes=codes)
    share = torch.rand(200, generator=torch.Generator().manual_seed(seed))
    values = min(low, high) + share * abs(high - low)

    grid = activation_grid(seen(values), spec, estimator)

    assert spec.qmin <= grid.zero_point.item() <= spec.qmax
    assert grid.zero_point.item() == round(grid.zero_point.item())
    assert grid.lay_over(torch.zeros(1, 1), torch.tensor([0])).item() == 0
    grid.to_qparams()  # takes no scale that is not positive and finite


@pytest.mark.parametrize("estimator", ["kl", "percentile", "mse"])
def test_an_outlier_is_clipped_by_all_estimators_but_min_max(estimator: str) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    values[0] = 40.0  # ten times beyond the rest
    spec = QuantSpec(4, signed=False)

    clipping, covering = (activation_grid(seen(values), spec, kind) for kind in (estimator, "minmax"))

    reach = [float((spec.qmax - grid.zero_point) * grid.scale) for grid in (clipping, covering)]
    assert reach[0] < 30
    assert reach[1] >= 38  # up to half a step of 2.9 below the outlier


def test_ties_round_to_the_even_multiple_before_the_zero_point_is_added() -> None:
    # round(x / s) + z. With an odd zero point, round(x / s + z) sends every tie to the other side.
    observation = Observation(-3.0, 12.0, torch.zeros(1))
    grid = activation_grid(observation, QuantSpec(4, signed=False), "minmax")
    assert (grid.scale.item(), grid.zero_point.item()) == (1.0, 3.0)
    ties = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])

    for laid in (grid.lay_over(ties, torch.tensor([0])), grid.lay_softly(ties, torch.tensor([0]))):
        assert laid.tolist() == [[-2, -2, 0, 0, 2, 2, 4]]
