"""Numbers for people."""

import math

import pytest

from tfmq_export.report.numbers import exact, many, seconds, short, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (7_450, "7.5 kB"), (100_000, "0.10 MB"), (2_670_000, "2.67 MB"), (1_500_000_000, "1.50 GB")],
)
def test_sizes_are_told_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (30.66, "30.7"),
        (0.00372, "0.00372"),
        (1234.5, "1234"),
        (1e-7, "1.0e-07"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert short(value) == text


def test_what_is_nearly_one_is_not_rounded_to_one() -> None:
    assert exact(0.999999) == "0.999999"
    assert exact(1.0) == "1"


def test_counts_and_times_are_told_in_the_unit_that_fits() -> None:
    assert [many(count) for count in (0, 999, 9_437_184)] == ["0", "999", "9.44 M"]
    assert [seconds(value) for value in (2.04, 130, 7_500)] == ["2.0 s", "2 min 10 s", "2 h 5 min"]
