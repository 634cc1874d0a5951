"""Factors followed backwards: scaling before must be scaling behind, for every layout operation."""

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nets.onnx_graphs import normal

from tfmq_export.passes.scaling.factor_layout import before_reshape, before_split, before_transpose

SHAPES = [(2, 12), (2, 3, 4), (2, 3, 2, 2), (2, 2, 6), (24,), (2, 1, 3, 4), (4, 3, 2), (1, 24)]


def factor_of(shape: tuple[int, ...], along: list[bool], equal: bool) -> np.ndarray:
    """Positive, and of size 1 on all other axes."""
    own = [size if yes else 1 for size, yes in zip(shape, along, strict=True)]
    return np.full(own, 3, np.float32) if equal else np.exp(normal(7, *own))


@given(after=st.sampled_from(SHAPES), before=st.sampled_from(SHAPES), equal=st.booleans(), data=st.data())
def test_a_reshape(after: tuple[int, ...], before: tuple[int, ...], equal: bool, data: st.DataObject) -> None:
    factor = factor_of(after, data.draw(st.lists(st.booleans(), min_size=len(after), max_size=len(after))), equal)
    x = normal(1, prod(before)).reshape(before)

    moved = before_reshape(factor, after, before)

    assert moved is not None  # everything is static, at worst the factor is as large as the value
    np.testing.assert_array_equal((x * moved).reshape(after), x.reshape(after) * factor)


@pytest.mark.parametrize(
    ("after", "before", "known"),
    [
        (["n", 6, "h", "w"], ["n", 2, 3, "h", "w"], True),
        (["n", 6, "h", "w"], ["n", 2, 3, "w", "h"], True),  # as many pixels, whatever their order
        (["n", 6, "h*w"], ["n", 6, "h", "w"], False),  # who says that these names mean the same size
        (["n", 6, None], ["n", 6, None], False),
        (["n", "c", 4], ["n", "c", 2, 2], False),
    ],
)
def test_names_of_sizes_have_to_be_the_same(after: list[Any], before: list[Any], known: bool) -> None:
    factor = np.exp(normal(0, 6)).reshape([6 if axis == 1 else 1 for axis in range(len(after))])

    moved = before_reshape(factor, after, before)

    assert (moved is not None) is known
    if moved is not None:
        np.testing.assert_array_equal(moved.reshape(-1), factor.reshape(-1))


@given(order=st.permutations(range(4)), axis=st.integers(0, 3))
def test_a_transpose(order: list[int], axis: int) -> None:
    x = normal(1, 2, 3, 4, 5)
    y = x.transpose(order)
    factor = factor_of(y.shape, [at == axis for at in range(4)], False)

    np.testing.assert_array_equal((x * before_transpose(factor, order)).transpose(order), y * factor)


def test_a_transpose_without_an_order_reverses_the_axes() -> None:
    x, factor = normal(1, 2, 3, 4), np.exp(normal(2, 4, 1, 1))

    np.testing.assert_array_equal((x * before_transpose(factor, None)).T, x.T * factor)


@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4), along=st.booleans(), data=st.data())
def test_a_split(sizes: list[int], along: bool, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, len(sizes) - 1))
    assume(sizes[part] > 0)
    x = normal(1, 2, sum(sizes), 3)
    factor = factor_of((2, sizes[part], 3), [False, along, True], False)

    whole = x * before_split(factor, 1, sizes, part)

    cuts = np.cumsum(sizes)[:-1]
    for at, (scaled, plain) in enumerate(zip(np.split(whole, cuts, 1), np.split(x, cuts, 1), strict=True)):
        np.testing.assert_array_equal(scaled, plain * factor if at == part else plain)
