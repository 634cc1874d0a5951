from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq_export.errors import RecipeError
from tfmq_export.recipe.grid import QParams, QuantSpec


def params(scale: object, zero_point: object, spec: QuantSpec) -> QParams:
    return QParams(spec, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32))


UNSIGNED = QuantSpec(8, signed=False)
PER_CHANNEL = QuantSpec(8, axis=0)


@given(bits=st.integers(2, 8), signed=st.booleans())
def test_a_grid_has_as_many_codes_as_its_bits_allow(bits: int, signed: bool) -> None:
    spec = QuantSpec(bits, signed)

    assert spec.qmax - spec.qmin + 1 == 2**bits
    assert spec.qmin == (-(spec.qmax + 1) if signed else 0)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 15, 17])
def test_other_widths_are_no_grid(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be in 2..8, or 16, got {bits}"):
        QuantSpec(bits)


def test_sixteen_bits_are_one_code_of_an_activation() -> None:
    assert QuantSpec(16, signed=False).qmax == 2**16 - 1
    for wrong in ({"signed": False, "codes": 2}, {"axis": 0}):
        with pytest.raises(RecipeError, match="16 bits are for activations, in one code"):
            QuantSpec(16, **wrong)


@given(bits=st.integers(2, 8), codes=st.integers(1, 16))
def test_codes_that_add_up_have_one_zero_between_them(bits: int, codes: int) -> None:
    spec = QuantSpec(bits, signed=False, codes=codes)

    assert (spec.qmin, spec.qmax) == (0, codes * (2**bits - 1))


@pytest.mark.parametrize(("codes", "signed"), [(0, False), (-1, False), (2, True)])
def test_only_unsigned_codes_add_up(codes: int, signed: bool) -> None:
    with pytest.raises(RecipeError, match="codes must be at least 1, and 1 on a signed grid"):
        QuantSpec(8, signed=signed, codes=codes)


def test_a_grid_cannot_be_edited() -> None:
    with pytest.raises(FrozenInstanceError):
        UNSIGNED.bits = 4  # type: ignore[misc]  # frozen: the point


@pytest.mark.parametrize(
    ("scale", "zero_point", "spec", "message"),
    [
        (0.0, 0, UNSIGNED, "every scale must be positive and finite"),
        (-1.0, 0, UNSIGNED, "every scale must be positive and finite"),
        (np.nan, 0, UNSIGNED, "every scale must be positive and finite"),
        (np.inf, 0, UNSIGNED, "every scale must be positive and finite"),
        ([1.0, 0.0], [0, 0], PER_CHANNEL, "every scale must be positive and finite"),
        (1.0, -1, UNSIGNED, "zero point outside 0..255"),
        (1.0, 256, UNSIGNED, "zero point outside 0..255"),
        (1.0, 8, QuantSpec(4), "zero point outside -8..7"),
        ([1.0], [0], UNSIGNED, "axis None cannot have a scale of shape"),
        (1.0, 0, PER_CHANNEL, "axis 0 cannot have a scale of shape"),
        ([[1.0]], [[0]], PER_CHANNEL, "axis 0 cannot have a scale of shape"),
        ([1.0, 1.0], [0], PER_CHANNEL, "differ in shape"),
    ],
)
def test_invalid_parameters_cannot_exist(scale: object, zero_point: object, spec: QuantSpec, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        params(scale, zero_point, spec)


def test_parameters_keep_their_types() -> None:
    with pytest.raises(RecipeError, match="scale must be float32 and zero_point int32, got float64 and int32"):
        QParams(UNSIGNED, np.asarray(1.0), np.asarray(0, np.int32))  # type: ignore[arg-type]  # refused: the point
    with pytest.raises(RecipeError, match="got float32 and int64"):
        QParams(UNSIGNED, np.asarray(1.0, np.float32), np.asarray(0))  # type: ignore[arg-type]  # refused: the point


def test_the_same_grid_is_spec_scale_and_zero_point() -> None:
    grid = params(0.5, 3, UNSIGNED)

    assert grid.same_as(params(0.5, 3, UNSIGNED))
    assert not grid.same_as(params(0.5, 3, QuantSpec(6, signed=False)))
    assert not grid.same_as(params(0.25, 3, UNSIGNED))
    assert not grid.same_as(params(0.5, 4, UNSIGNED))
