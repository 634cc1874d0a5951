"""The pair rule against a bit-exact model of the kernels it protects from (``tests/saturating.py``)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from standins.saturating import (
    exact_sums,
    in_kernel_order,
    rule_keeping,
    saturating_dot,
    saturating_sums,
    stacked,
    worst_windows,
)

from tfmq_export.ptq.pairs import Pairs
from tfmq_export.recipe.pairs import PAIR_SUM, SAFE_INPUT_BITS, SAFE_WEIGHT_BITS, largest_pair, partners, within_pairs

BYTES = np.arange(-128, 128)
EVERY_PAIR = np.stack(np.meshgrid(BYTES, BYTES), -1).reshape(-1, 2).astype(np.int8)  # [65536, 2]
EDGES = [-128, -127, -65, -64, -63, -1, 0, 1, 63, 64, 65, 127]
WEIGHTS = st.sampled_from(EDGES) | st.integers(-128, 127)
CODES = st.sampled_from([0, 255]) | st.integers(0, 255)

# (shape of the weight, groups): even and odd channels, kernels of one position and of several, none of them depthwise.
LAYERS = [
    ((3, 8), 1),
    ((3, 7), 1),
    ((2, 1), 1),
    ((2, 6, 1, 1), 1),
    ((2, 5, 1, 1), 1),
    ((2, 4, 3, 3), 1),
    ((2, 3, 3, 3), 1),
    ((4, 2, 2, 3), 2),
    ((6, 3, 3), 3),
    ((4, 1, 3, 3), 2),
    ((2, 2, 2, 2, 2), 1),
]


def saturate(largest_code: int) -> NDArray[np.bool_]:
    """Which of all pairs of weights some codes from 0 to ``largest_code`` saturate."""
    corners = largest_code * np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.uint8)  # the sum is linear in both codes
    found = saturating_dot(corners[None], EVERY_PAIR[:, None])
    exact = (corners[None].astype(int) * EVERY_PAIR[:, None]).sum(-1)
    return (found != exact).any(1)


@st.composite
def kept_layers(draw: st.DrawFn) -> tuple[NDArray[np.int8], int, int]:
    """A weight that keeps the rule, its groups, and how many codes its input has."""
    shape, groups = draw(st.sampled_from(LAYERS))
    codes = draw(st.integers(1, 4)) if groups == 1 else 1
    neighbours = partners(shape, groups, codes)
    assert neighbours is not None
    return rule_keeping(draw(arrays.arrays(np.int8, shape, elements=WEIGHTS)), neighbours), groups, codes


def test_a_pair_saturates_for_some_codes_exactly_where_it_breaks_the_rule() -> None:
    breaks = largest_pair(EVERY_PAIR, np.array([1, 0])) > PAIR_SUM

    saturates = saturate(255)

    np.testing.assert_array_equal(saturates, breaks)
    sums = EVERY_PAIR.sum(1, dtype=int)
    np.testing.assert_array_equal(breaks, abs(sums) > 128)  # of opposite signs none gets that far


@settings(max_examples=50, deadline=None)
@given(first=st.integers(2, 127), negative=st.booleans())
def test_one_step_beyond_the_rule_some_input_saturates(first: int, negative: bool) -> None:
    kept = np.int8([-first, first - 128] if negative else [first, 128 - first]).reshape(1, 2)
    beyond = kept + np.int8([0, -1 if negative else 1])

    saturated = [saturating_dot(np.uint8([255, 255]), pair)[0] for pair in (kept, beyond)]

    sign = -1 if negative else 1
    assert saturated == [sign * 255 * 128, -32768 if negative else 32767]


@settings(max_examples=100, deadline=None)
@given(kept_layers(), st.data())
def test_weights_that_keep_the_rule_are_summed_exactly_for_every_input(
    layer: tuple[NDArray[np.int8], int, int], data: st.DataObject
) -> None:
    weight, groups, codes = layer
    stored = stacked(weight, codes)
    channels = stored.shape[1] * groups
    drawn = data.draw(arrays.arrays(np.uint8, (3, channels, *stored.shape[2:]), elements=CODES))

    for windows in (drawn, worst_windows(stored, groups), np.full_like(drawn, 255)):
        np.testing.assert_array_equal(saturating_sums(windows, stored, groups), exact_sums(windows, stored, groups))


@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 3, 3), 1), ((4, 2, 3), 2), ((2, 6), 1)])
def test_one_pair_too_large_is_enough_to_spoil_a_layer(shape: tuple[int, ...], groups: int) -> None:
    neighbours = partners(shape, groups)
    assert neighbours is not None
    kept = rule_keeping(np.full(shape, 65, np.int8), neighbours)  # 65 beside 63
    for position in range(len(neighbours)):
        beyond = kept.reshape(len(kept), -1).copy()
        beyond[-1, position] += 1
        spoiled = beyond.reshape(shape)

        windows = worst_windows(spoiled, groups)

        wrong = saturating_sums(windows, spoiled, groups) != exact_sums(windows, spoiled, groups)
        assert wrong[:, -1].any()
        assert not wrong[:, :-1].any()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([((2, 3, 3, 3), 1), ((2, 5, 1, 1), 3), ((2, 1, 2), 1), ((3, 7, 2), 2)]), st.data())
def test_with_odd_channels_every_order_of_adding_is_exact(
    layer: tuple[tuple[int, ...], int], data: st.DataObject
) -> None:
    shape, codes = layer
    neighbours = partners(shape, codes=codes)
    assert neighbours is not None
    weight = rule_keeping(data.draw(arrays.arrays(np.int8, shape, elements=WEIGHTS)), neighbours)
    order = data.draw(st.permutations(range(codes * weight[0].size)))

    rows = stacked(weight, codes).reshape(len(weight), -1)[:, order]

    windows = worst_windows(rows)
    np.testing.assert_array_equal(saturating_sums(windows, rows), exact_sums(windows, rows))


def test_with_odd_channels_a_weight_above_64_can_saturate() -> None:
    weight = np.full((1, 3, 3, 3), 64, np.int8)
    weight[0, 1, 0, 0] = 65

    windows = worst_windows(weight)

    assert (saturating_sums(windows, weight) != exact_sums(windows, weight)).any()


def test_a_copy_of_the_channels_moves_an_odd_number_of_them() -> None:
    weight = np.int8([[1, 127, 64]])  # safe on one code; on two, 64 is beside the 1 of the copy, and 127 beside 64
    neighbours = [partners(weight.shape, codes=codes) for codes in (1, 2)]
    copies = stacked(weight, 2)
    windows = worst_windows(copies)

    assert [largest_pair(weight, found).item() for found in neighbours if found is not None] == [128, 254]
    assert (saturating_sums(windows, copies) != exact_sums(windows, copies)).any()


@pytest.mark.parametrize("codes", [1, 2, 3])
@pytest.mark.parametrize(("shape", "groups"), LAYERS)
def test_neighbours_are_those_of_each_other(shape: tuple[int, ...], groups: int, codes: int) -> None:
    neighbours = partners(shape, groups, codes)

    assert neighbours is not None
    everyone = np.arange(np.prod(shape[1:]))
    np.testing.assert_array_equal(np.sort(neighbours), everyone)
    np.testing.assert_array_equal(neighbours[neighbours], everyone)


@pytest.mark.parametrize(
    ("shape", "codes"), [((1, 6), 1), ((1, 7), 1), ((1, 4, 3, 3), 1), ((1, 2, 1, 1), 2), ((1, 4, 2), 3)]
)
def test_neighbours_are_those_that_a_kernel_adds(shape: tuple[int, ...], codes: int) -> None:
    places = np.arange(np.prod(shape)).reshape(shape)

    (read,) = in_kernel_order(stacked(places, codes))

    neighbours = partners(shape, 1, codes)
    assert neighbours is not None
    for first, second in zip(read[::2], read[1::2], strict=False):
        assert (neighbours[first], neighbours[second]) == (second, first)


@pytest.mark.parametrize(
    ("shape", "codes"), [((2, 3, 3, 3), 1), ((2, 1, 3, 3), 1), ((2, 5, 1, 1), 2), ((2, 5, 2), 2), ((4, 1, 3, 3), 1)]
)
def test_where_the_order_is_not_known_every_weight_is_its_own_neighbour(shape: tuple[int, ...], codes: int) -> None:
    np.testing.assert_array_equal(partners(shape, 1, codes), np.arange(np.prod(shape[1:])))


def test_only_a_depthwise_convolution_has_no_pairs() -> None:
    assert partners((8, 1, 3, 3), groups=8) is None
    assert partners((8, 1, 3), groups=8) is None
    assert partners((8, 1, 3, 3), groups=4) is not None  # two outputs of each channel: an ordinary kernel
    assert partners((1, 1, 3, 3), groups=1) is not None
    assert partners((8, 2, 3, 3), groups=8) is not None


def test_narrow_weights_and_narrow_codes_need_no_rule() -> None:
    end = 1 << (SAFE_WEIGHT_BITS - 1)
    narrow = np.isin(EVERY_PAIR, np.arange(-end, end)).all(1)

    assert not saturate(255)[narrow].any()
    assert not saturate((1 << SAFE_INPUT_BITS) - 1).any()
    assert saturate(255).any()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(LAYERS), st.data())
def test_the_largest_pair_is_found_in_each_output_channel(
    layer: tuple[tuple[int, ...], int], data: st.DataObject
) -> None:
    shape, groups = layer
    neighbours = partners(shape, groups)
    assert neighbours is not None
    weight = data.draw(arrays.arrays(np.int8, shape, elements=WEIGHTS))

    found = largest_pair(weight, neighbours)

    for sum_, row in zip(found, weight.reshape(len(weight), -1).tolist(), strict=True):
        pairs = [(row[first], row[second]) for first, second in enumerate(neighbours)]
        assert sum_ == max([abs(one + other) for one, other in pairs if one * other > 0], default=0)


STEPS = arrays.arrays(np.float32, (3, 6), elements=st.floats(-600, 600, width=32))
NEIGHBOURS = [np.array([1, 0, 3, 2, 5, 4]), np.array([1, 0, 3, 2, 4, 5]), np.arange(6)]


@settings(max_examples=100, deadline=None)
@given(STEPS, st.sampled_from(NEIGHBOURS))
def test_what_a_pair_has_too_much_is_given_up_towards_zero(
    steps: NDArray[np.float32], neighbours: NDArray[np.int64]
) -> None:
    found = within_pairs(steps, neighbours)

    other = found[:, neighbours]
    sums = np.where(found * other > 0, abs(found + other), 0)
    assert sums.max() <= PAIR_SUM * (1 + 1e-6)  # a sum of two float32 of up to 600
    assert (abs(found) <= abs(steps)).all()
    assert (found * steps >= 0).all()
    beside = steps[:, neighbours]
    kept = (steps * beside <= 0) | (abs(steps + beside) <= PAIR_SUM)
    np.testing.assert_array_equal(found[kept], steps[kept])


@settings(max_examples=30, deadline=None)
@given(st.floats(-128, 128), st.floats(-128, 128))
def test_no_pair_that_keeps_the_rule_is_nearer(first: float, second: float) -> None:
    lattice = EVERY_PAIR[largest_pair(EVERY_PAIR, np.array([1, 0])) <= PAIR_SUM]
    steps = np.array([[first, second]])

    found = within_pairs(steps, np.array([1, 0]))

    nearest = np.hypot(*(lattice - steps).T).min()
    assert np.hypot(*(found - steps)[0]) <= nearest + 1e-9  # float64 of up to 128


@settings(max_examples=100, deadline=None)
@given(STEPS, st.sampled_from(NEIGHBOURS))
def test_both_halves_of_the_compiler_know_the_same_nearest_weights(
    steps: NDArray[np.float32], neighbours: NDArray[np.int64]
) -> None:
    found = Pairs(torch.from_numpy(neighbours)).within(torch.from_numpy(steps))

    np.testing.assert_array_equal(found.numpy(), within_pairs(steps, neighbours))


@pytest.mark.parametrize(("shape", "groups"), [((8, 4, 3, 3), 1), ((8, 3, 3, 3), 1), ((8, 7), 1), ((8, 2, 3), 4)])
def test_the_pairs_of_a_tensor_are_the_partners_of_its_shape(shape: tuple[int, ...], groups: int) -> None:
    pairs = Pairs.of(torch.zeros(shape), groups, 1)

    assert pairs is not None
    np.testing.assert_array_equal(pairs.neighbours.numpy(), partners(shape, groups))
    assert Pairs.of(torch.zeros(8, 1, 3, 3), 8, 1) is None
