"""What a graph says, read with a check: the answer, or a refusal that names the value or the node."""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.reading import (
    computed,
    constant_values,
    double_values,
    element_type,
    float_attribute,
    float_values,
    int_attribute,
    ints_attribute,
    known_shape,
    produced_by,
    rank_of,
    sizes_per_sample,
    static_size,
)

IMAGE = gs.Variable("image", np.float32, ("batch", 3, None, 8))
TOKENS = gs.Variable("tokens", np.dtype(np.float16), ["batch", 16, 8])
UNKNOWN = gs.Variable("unknown")
HALVES = gs.Variable("halves", TensorProto.BFLOAT16)
WEIGHT = gs.Constant("weight", np.array([[0.1, 2.0]], np.float32))
CODES = gs.Constant("codes", np.array([-1, 3], np.int8))
CONV = gs.Node("Conv", "conv", {"group": 2, "pads": [1, 0], "auto_pad": "VALID", "alpha": 0.1}, outputs=[IMAGE])


def test_what_is_said_is_returned() -> None:
    assert known_shape(IMAGE) == ("batch", 3, None, 8)
    assert (rank_of(IMAGE), rank_of(WEIGHT)) == (4, 2)
    assert (static_size(IMAGE, 1), static_size(IMAGE, -1), static_size(WEIGHT, 1)) == (3, 8, 2)
    assert sizes_per_sample(TOKENS) == (16, 8)
    assert (element_type(IMAGE), element_type(TOKENS), element_type(CODES)) == (np.float32, np.float16, np.int8)
    assert computed(IMAGE) is IMAGE
    assert produced_by(IMAGE, "Conv") is CONV
    assert (int_attribute(CONV, "group", 1), int_attribute(CONV, "axis", 1)) == (2, 1)
    assert (float_attribute(CONV, "alpha", 1.0), float_attribute(CONV, "epsilon", 1e-5)) == (0.1, 1e-5)
    assert float_attribute(CONV, "group", 1.0) == 2.0
    assert (ints_attribute(CONV, "pads"), ints_attribute(CONV, "strides")) == ([1, 0], None)


def test_constants_are_read_in_the_precision_that_is_asked_for() -> None:
    assert constant_values(CODES) is CODES.values
    assert float_values(WEIGHT) is WEIGHT.values
    np.testing.assert_array_equal(double_values(WEIGHT), [[np.float64(np.float32(0.1)), 2.0]])
    np.testing.assert_array_equal(double_values(CODES), [-1.0, 3.0])
    assert double_values(CODES).dtype == np.float64


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: known_shape(UNKNOWN), "the rank of unknown is not known"),
        (lambda: static_size(IMAGE, 0), "the size of image is not known: batch, axis 0"),
        (lambda: static_size(UNKNOWN, 0), "the rank of unknown is not known"),
        (lambda: sizes_per_sample(IMAGE), "the size of image is not known: None, axis 2"),
        (lambda: element_type(UNKNOWN), "the type of unknown is not known"),
        (lambda: element_type(HALVES), "halves is of a type that numpy does not have: 16 of onnx.TensorProto"),
        (lambda: computed(WEIGHT), "weight is a constant"),
        (lambda: constant_values(IMAGE), "image is computed, not a constant"),
        (lambda: float_values(CODES), "codes holds int8, not float32"),
        (lambda: produced_by(IMAGE, "MatMul"), "image does not come from MatMul"),
        (lambda: produced_by(WEIGHT, "MatMul"), "weight does not come from MatMul"),
        (lambda: int_attribute(CONV, "auto_pad"), "conv: Conv needs a whole number as auto_pad, got VALID"),
        (lambda: int_attribute(CONV, "num_groups"), "conv: Conv needs a whole number as num_groups, got None"),
        (lambda: float_attribute(CONV, "pads", 1.0), r"conv: Conv needs a number as pads, got \[1, 0\]"),
        (lambda: ints_attribute(CONV, "group"), "conv: Conv needs whole numbers as group, got 2"),
    ],
)
def test_what_is_not_said_is_refused_by_name(read: Callable[[], object], reason: str) -> None:
    with pytest.raises(PreconditionError, match=reason):
        read()
