"""The solver against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_export.search.choices import Choice, fits, least_cost, least_error, least_error_at, least_size, total

Sites = list[tuple[Choice, ...]]


def sites_of(seed: int, count: int = 5) -> Sites:
    """Layers with 8 and 4 bits, each in integers and in floating point."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        weights, (wide, narrow), activations = (
            int(rng.integers(100, 9000)),
            np.sort(rng.exponential(1, 2)),
            rng.random(),
        )
        work = float(rng.random())
        found.append(
            tuple(
                Choice(float(error + (activations if integer else 0)), size, 0.0 if integer else work)
                for error, size in ((wide, weights), (narrow, weights // 2))
                for integer in (True, False)
            )
        )
    return found


def room_for(sites: Sites, share: float) -> int:
    """Bytes between those of the smallest choices and those of the largest."""
    sizes = [choice.size for choice in everything(sites)]
    return int(min(sizes) + share * (max(sizes) - min(sizes)))


def everything(sites: Sites) -> list[Choice]:
    return [total(sites, picks) for picks in itertools.product(*(range(len(site)) for site in sites))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_the_least_error_in_so_many_bytes_is_that_of_trying_all(seed: int, share: float) -> None:
    sites = sites_of(seed)
    sizes = [choice.size for choice in everything(sites)]
    room = int(min(sizes) + share * (max(sizes) - min(sizes)))

    found = total(sites, least_error(sites, room))

    best = min(choice.error for choice in everything(sites) if choice.size <= room)
    # A size rounded up to a bucket of 1/4000 of the room may lose a choice that fits to the byte.
    loosened = room - 5 * (room - min(sizes)) // 4000 - 5
    nearly = min((choice.error for choice in everything(sites) if choice.size <= loosened), default=np.inf)
    assert found.size <= room
    assert best - 1e-12 <= found.error <= nearly + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1), slack=st.floats(1.05, 4))
def test_both_bounds_are_kept_at_a_cost_near_the_least(seed: int, share: float, slack: float) -> None:
    sites = sites_of(seed, 6)
    room = room_for(sites, share)
    error = total(sites, least_error(sites, room)).error * slack

    picks = least_cost(sites, error, room)

    assert picks is not None
    found = total(sites, picks)
    assert found.size <= room
    assert found.error <= error
    best = min(choice.cost for choice in everything(sites) if choice.size <= room and choice.error <= error)
    # Lagrange finds the lower hull: at most one site away from the least.
    assert found.cost <= best + max(max(choice.cost for choice in site) for site in sites)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1), work=st.floats(0, 3))
def test_a_bound_on_the_work_is_kept_at_an_error_near_the_least(seed: int, share: float, work: float) -> None:
    sites = sites_of(seed, 6)
    room = room_for(sites, share)

    picks = least_error_at(sites, work, room)

    assert picks is not None
    found = total(sites, picks)
    assert found.size <= room
    assert found.cost <= work
    best = min(choice.error for choice in everything(sites) if choice.size <= room and choice.cost <= work)
    assert found.error <= best + max(max(choice.error for choice in site) for site in sites)


def test_no_work_at_all_is_integers_only() -> None:
    sites = sites_of(3)
    integers = [site[::2] for site in sites]

    picks = least_error_at(sites, 0.0, None)

    assert picks is not None
    assert total(sites, picks) == total(integers, least_error(integers, None))
    assert least_error_at(sites, -1.0, None) is None


def test_the_smallest_file_with_an_error_spends_bytes_where_they_count() -> None:
    cheap, dear = (Choice(0.0, 100), Choice(9.0, 50)), (Choice(0.0, 9000), Choice(1.0, 4500))

    assert least_size([cheap, dear], 1.5) == (0, 1)
    assert least_size([cheap, dear], 0.5) == (0, 0)
    assert least_size([cheap, dear], 20.0) == (1, 1)


def test_what_no_choice_reaches_is_said() -> None:
    sites = [(Choice(1.0, 100), Choice(2.0, 50))]

    assert least_size(sites, 0.5) is None
    assert least_cost(sites, 1.5, 60) is None
    assert not fits(sites, 49)
    assert fits(sites, 50)


def test_many_layers_take_no_time_to_speak_of() -> None:
    sites = sites_of(0, 300)
    room = sum(site[0].size for site in sites) * 2 // 3

    picks = least_cost(sites, total(sites, least_error(sites, room)).error * 1.2, room)

    assert picks is not None
    assert total(sites, picks).size == pytest.approx(room, rel=0.05)
