import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq_export.errors import ConfigError, TimestepError
from tfmq_export.recipe.timesteps import TimestepSet, shown

integers = st.lists(st.integers(-10, 2000), min_size=1, max_size=20, unique=True)
reals = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20, unique=True)


@given(integers)
def test_integers_find_their_rows(values: list[int]) -> None:
    schedule = TimestepSet.of(np.asarray(values))

    assert not schedule.real
    assert schedule.values == tuple(values)
    np.testing.assert_array_equal(schedule.rows(schedule.array[::-1]), np.arange(len(values))[::-1])


@given(reals)
def test_reals_find_their_rows_in_either_precision(values: list[float]) -> None:
    schedule = TimestepSet.of(np.asarray(values, np.float64))

    assert schedule.real
    assert schedule.array.dtype == np.float32
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(schedule.rows(np.asarray(values, dtype)), np.arange(len(values)))


def test_a_decimal_is_the_float32_next_to_it() -> None:
    schedule = TimestepSet.of([0.1, 0.2])

    assert schedule.values[0] == float(np.float32(0.1)) != 0.1
    assert schedule.rows(np.asarray([0.2])) == [1]


@pytest.mark.parametrize("timestep", [-1, 1, 998, 0.5, 999.5, np.nan])
def test_a_timestep_outside_is_named(timestep: float) -> None:
    schedule = TimestepSet((999, 500, 0))

    with pytest.raises(TimestepError, match=rf"timestep {timestep} is not in this schedule of 3 steps \(999, 500, 0\)"):
        schedule.rows(np.asarray([timestep, 500]))


def test_a_real_timestep_is_shown_so_that_it_finds_its_row() -> None:
    schedule = TimestepSet((1.0955066, 0.5), real=True)

    assert schedule.describe() == "1.0955066, 0.5"
    assert schedule.rows(np.asarray([float(shown(value)) for value in schedule.values])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "real", "message"),
    [
        ((), False, "needs at least one timestep"),
        ((3, 2, 3), False, "visits each timestep once"),
        ((0.5, 0.25, 0.5), True, "visits each timestep once"),
        ((1.0, np.nan), True, "every timestep must be finite"),
        ((np.inf,), False, "every timestep must be finite"),
        ((1.5, 0.5), False, "fractional timesteps need a real-valued schedule"),
    ],
)
def test_invalid_schedules_cannot_exist(values: tuple[float, ...], real: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimestepSet(values, real)


def test_reals_that_float32_cannot_tell_apart_repeat() -> None:
    with pytest.raises(ConfigError, match="visits each timestep once"):
        TimestepSet.of([0.1, 0.1 + 1e-12])


@pytest.mark.parametrize("values", [["a"], [True], [1j]])
def test_what_is_no_number_is_no_timestep(values: object) -> None:
    with pytest.raises(ConfigError, match="timesteps must be numbers"):
        TimestepSet.of(values)


def test_long_schedules_are_described_in_short() -> None:
    assert TimestepSet((3, 2, 1, 0)).describe() == "3, 2, 1, 0"
    assert TimestepSet((4, 3, 2, 1, 0)).describe() == "4, 3, ..., 0"
    assert TimestepSet((0.5, 0.25), real=True).describe() == "0.5, 0.25"


def test_a_walk_is_keyed_by_its_first_visits() -> None:
    # As PLMS walks: the second timestep twice, and as floats, the way Euler holds them.
    walk = TimestepSet.visited(np.asarray([900.0, 800.0, 800.0, 700.0], np.float32))

    assert walk == TimestepSet((900, 800, 700))


def test_one_fraction_keeps_the_whole_walk_real() -> None:
    walk = TimestepSet.visited(np.asarray([900.0, 834.2375, 834.2375], np.float32))

    assert walk == TimestepSet((900.0, float(np.float32(834.2375))), real=True)


@given(reals, st.data())
def test_a_walk_inside_the_set_is_let_pass(values: list[float], data: st.DataObject) -> None:
    schedule = TimestepSet.of(np.asarray(values, np.float64))

    schedule.require(data.draw(st.lists(st.sampled_from(values))), "sampler")


def test_a_walk_that_leaves_the_set_is_refused_with_what_is_missing() -> None:
    schedule = TimestepSet((900, 600, 300))

    with pytest.raises(
        TimestepError, match=r"^Euler: timestep 750 is not in the bundle's table of 3; the table holds 900"
    ):
        schedule.require(np.asarray([900, 750, 300]), "Euler")
    with pytest.raises(TimestepError, match=r"timestep 850 is not .* \(also 850.5, 0\)"):
        schedule.require(np.asarray([850, 900, 850.5, 850, 0]), "Euler")
