import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.effort import EFFORTS, RoundingSchedule, find_effort


@pytest.mark.parametrize(("bits", "iterations"), [(3, 600), (4, 600), (6, 200), (8, 200)])
def test_finer_weights_take_their_own_count(bits: int, iterations: int) -> None:
    assert RoundingSchedule(600, 8, 1e-2, iterations_8bit=200).for_bits(bits) == RoundingSchedule(
        iterations, 8, 1e-2, iterations_8bit=200
    )


def test_without_one_all_weights_take_the_same() -> None:
    schedule = RoundingSchedule(600, 8, 1e-2)

    assert schedule.for_bits(8) is schedule


def test_efforts_grow() -> None:
    fast, standard, paper = (find_effort(name) for name in ("fast", "standard", "paper"))

    assert fast.rounding.iterations < standard.rounding.iterations < paper.rounding.iterations
    assert fast.rows_per_timestep < standard.rows_per_timestep < paper.rows_per_timestep
    assert all(effort.images >= effort.rows_per_timestep for effort in EFFORTS.values())  # no sample twice


def test_an_unknown_effort_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown effort 'quick'; there is fast, standard, paper"):
        find_effort("quick")
