from functools import partial

import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.runtime.measure.benchmark import Timing, peak_rss_bytes, speedups, take_turns


def test_candidates_alternate_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def turn(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    timings = take_turns({name: partial(turn, name) for name in "abc"}, rounds=3, warmup=1, seconds_budget=60)

    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"  # each round starts with the next
    assert timings["a"].seconds == (4.0, 9.0, 11.0)


def test_the_budget_ends_the_measurement_after_a_round_at_the_earliest() -> None:
    (timing,) = take_turns({"nap": lambda: 0.01}, rounds=1000, warmup=5, seconds_budget=0).values()

    assert timing.seconds == (0.01,)


def test_a_timing_has_order_statistics() -> None:
    timing = Timing(tuple(float(value) for value in range(11)))

    assert (timing.p10, timing.median, timing.p90, timing.count) == (1.0, 5.0, 9.0, 11)


def test_a_speedup_is_the_median_of_ratios_within_a_round() -> None:
    # The machine slows down threefold after round one: medians of the columns would mislead.
    timings = {"fp32": Timing((2.0, 6.0, 6.0)), "int8": Timing((1.0, 3.0, 2.0))}

    assert speedups(timings, "fp32") == {"fp32": 1.0, "int8": 2.0}


def test_measurements_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="no timing of the baseline"):
        speedups({"int8": Timing((1.0,))}, "fp32")
    with pytest.raises(ConfigError, match="time them together"):
        speedups({"int8": Timing((1.0,)), "fp32": Timing((1.0, 2.0))}, "fp32")
    with pytest.raises(ConfigError, match="at least one candidate"):
        take_turns({})
    with pytest.raises(ConfigError, match="rounds >= 1"):
        take_turns({"a": lambda: 1.0}, rounds=0)


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_rss_bytes()

    assert peak is None or peak > 10_000_000
