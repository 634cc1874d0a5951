"""From a survey and a goal to bits."""

from dataclasses import replace

import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.search.choices import Choice
from tfmq_export.search.latency import Latency
from tfmq_export.search.plan import Goal, Misses, plan_bits
from tfmq_export.search.sites import LayerSite, PartErrors
from tfmq_export.search.survey import Decibels, Survey


def site(name: str, weights: int, wide: float, narrow: float, activations: float, work: float = 0.1) -> LayerSite:
    errors = PartErrors({8: wide, 4: narrow}, activations, 0.0)
    choices = (
        Choice(wide + activations, weights),
        Choice(wide, weights, work),
        Choice(narrow + activations, weights // 2),
        Choice(narrow, weights // 2, work),
    )
    return LayerSite(name, f"net.{name}", ((8, 8), (8, FLOAT), (4, 8), (4, FLOAT)), choices, errors)


SURVEY = Survey(
    sites=(
        site("small", 1_000, 0.1, 30.0, 0.2),  # few weights, and they matter
        site("large", 100_000, 0.1, 1.0, 0.2),
        site("noisy", 10_000, 0.1, 1.0, 10.0),  # its activations matter
    ),
    tables={"fp32": Choice(0.0, 20_000), "fp16": Choice(0.001, 10_000)},
    decibels=Decibels(1.0, 30.0),
    fixed=5_000,
)


def bits(goal: Goal, pins: dict[str, Widths] | None = None, misses: Misses = Misses()) -> dict[str, tuple]:  # noqa: B008
    plan = plan_bits(SURVEY, goal, pins or {}, misses)
    return {name: (widths.weights, widths.inputs) for name, widths in plan.widths.items()}


def test_a_size_alone_gives_bits_where_they_count_and_keeps_integers() -> None:
    plan = plan_bits(SURVEY, Goal(None, 80_000), {})

    assert bits(Goal(None, 80_000)) == {"small": (8, 8), "large": (4, 8), "noisy": (8, 8)}
    assert plan.size <= 80_000
    assert plan.tables == "fp16"


def test_a_psnr_alone_gives_the_smallest_file_that_has_it() -> None:
    plan = plan_bits(SURVEY, Goal(18.7, None), {})

    assert bits(Goal(18.7, None)) == {"small": (8, 8), "large": (4, 8), "noisy": (4, 8)}
    assert plan.psnr >= 18.7


def test_where_a_size_leaves_no_other_way_accuracy_is_bought_with_speed() -> None:
    wanted = Goal(25.0, 72_000)

    assert bits(wanted) == {"small": (8, 8), "large": (4, 8), "noisy": (4, FLOAT)}


def timed(goal: Goal, latency: Latency, misses: Misses = Misses()) -> dict[str, tuple]:  # noqa: B008
    plan = plan_bits(replace(SURVEY, latency=latency), goal, {}, misses)
    assert plan.seconds is not None
    assert goal.seconds is None or plan.seconds <= goal.seconds
    return {name: (widths.weights, widths.inputs) for name, widths in plan.widths.items()}


def test_a_time_buys_the_best_images_that_fit_into_it() -> None:
    latency = Latency(10e-3, 40e-3)  # a layer of this survey in floating point takes 4 ms more

    assert timed(Goal(None, None, 10e-3), latency) == dict.fromkeys(("small", "large", "noisy"), (8, 8))
    assert timed(Goal(None, None, 15e-3), latency)["noisy"] == (8, FLOAT)  # one layer: that which gains most
    assert timed(Goal(None, None, 15e-3), latency)["large"] == (8, 8)
    assert timed(Goal(None, None, 30e-3), latency) == dict.fromkeys(("small", "large", "noisy"), (8, FLOAT))
    assert timed(Goal(None, 72_000, 15e-3), latency)["large"] == (4, 8)
    assert timed(Goal(25.0, None, 15e-3), latency)["noisy"][1] == FLOAT


def test_a_call_that_took_longer_makes_the_next_choice_stricter() -> None:
    latency = Latency(10e-3, 40e-3)

    assert timed(Goal(None, None, 15e-3), latency, Misses(seconds=2e-3))["noisy"] == (8, 8)
    assert timed(Goal(90.0, None, 15e-3), latency)["noisy"] == (8, FLOAT)  # out of reach: as near as the time allows


def test_a_time_below_that_of_integers_is_refused() -> None:
    survey = replace(SURVEY, latency=Latency(10e-3, 40e-3))

    with pytest.raises(ConfigError, match="--max-latency 9 ms: a call with every layer in integers takes 10 ms here"):
        plan_bits(survey, Goal(None, None, 9e-3), {})


def test_where_floats_are_no_slower_a_time_does_not_bind() -> None:
    assert timed(Goal(None, None, 10e-3), Latency(10e-3, -1e-3))["large"] == (8, FLOAT)


def test_a_pin_stays_and_its_reason_with_it() -> None:
    pins = {"large": Widths(8, None, "pinned by large"), "gone": Widths(FLOAT, None, "pinned by gone")}

    plan = plan_bits(SURVEY, Goal(None, 200_000), pins)

    assert plan.widths["gone"].is_float
    assert plan.widths["large"].why.startswith("pinned by large; ")


def test_every_choice_says_why() -> None:
    plan = plan_bits(SURVEY, Goal(25.0, 72_000), {})

    assert plan.widths["small"].why.startswith("auto: 8 bits, 4 would add ")
    assert plan.widths["small"].why.endswith(" to the error and save 0.5 kB")
    assert "in floating point, since integers would add" in plan.widths["noisy"].why
    assert "1 layer in 4 bits and floating point" in plan.describe()


def test_a_bundle_that_missed_makes_the_next_choice_stricter() -> None:
    assert bits(Goal(18.7, None)) != bits(Goal(18.7, None), misses=Misses(psnr=-2.0))
    assert plan_bits(SURVEY, Goal(None, 80_000), {}, Misses(size=9_000)).size <= 80_000


def test_a_goal_out_of_reach_is_approached_and_a_size_below_all_refused() -> None:
    nearest = plan_bits(SURVEY, Goal(90.0, 72_000), {})

    assert nearest.psnr < 90
    assert nearest.size <= 72_000
    with pytest.raises(ConfigError, match=r"--max-size 1\.0 kB: the smallest choice of bits takes 70\.5 kB"):
        plan_bits(SURVEY, Goal(None, 1_000), {})


def test_decibels_are_a_line_through_two_drafts() -> None:
    line = Decibels.through((1e-4, 30.0), (1e-3, 22.0))

    assert line.of(1e-4) == pytest.approx(30.0)
    assert line.of(1e-3) == pytest.approx(22.0)
    assert line.error(25.0) == pytest.approx(10 ** (-4 + 5 / 8))
    assert Decibels.through((1e-4, 30.0), (1.01e-4, 12.0)).slope == 1.0  # two drafts alike tell no slope
