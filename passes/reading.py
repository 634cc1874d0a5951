"""Read what a graph says of its values and nodes, and refuse where it does not say it.

A file may leave out a shape, a type or an attribute, and an initializer may turn out to be computed. Each function
here returns what its name says or raises ``PreconditionError``; so no pass computes with ``None`` or with a guess.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from tfmq_export.errors import PreconditionError
from tfmq_export.pages import release_spans, span_of

Size = int | str | None
"""Of an axis: static, named, or not known."""
Shape = Sequence[Size]
ElementType = np.dtype[np.generic] | type[np.generic] | int
"""A number stands for a type that numpy does not have: one of onnx.TensorProto."""


class Computed(LazyValues):
    """Numbers of a constant that are computed whenever they are read, and kept by nobody.

    Args:
        like: Of the same shape and type; what they are computed from.
    """

    def __init__(self, like: NDArray[np.generic], compute: Callable[[], NDArray[np.generic]]) -> None:
        self.shape, self.dtype, self.nbytes = list(like.shape), like.dtype, like.nbytes
        self.like = like
        self.load = compute

    @property
    def tensor(self) -> TensorProto:
        """For graphsurgeon, which writes what is lazy by this."""
        return numpy_helper.from_array(self.load())


def known_shape(value: gs.Tensor) -> Shape:
    """The size of each axis; some of them may be named."""
    if value.shape is None:
        raise PreconditionError(f"the rank of {value.name} is not known")
    return value.shape


def rank_of(value: gs.Tensor) -> int:
    """Number of axes."""
    return len(known_shape(value))


def static_size(value: gs.Tensor, axis: int) -> int:
    """Size of an axis that is neither named nor unknown."""
    size = known_shape(value)[axis]
    if not isinstance(size, int):
        raise PreconditionError(f"the size of {value.name} is not known: {size}, axis {axis}")
    return size


def sizes_per_sample(value: gs.Tensor) -> tuple[int, ...]:
    """All sizes but that of the first axis, the batch."""
    return tuple(static_size(value, axis) for axis in range(1, rank_of(value)))


def element_type(value: gs.Tensor) -> np.dtype[np.generic]:
    """What a value is made of."""
    if value.dtype is None:
        raise PreconditionError(f"the type of {value.name} is not known")
    if isinstance(value.dtype, int):
        raise PreconditionError(
            f"{value.name} is of a type that numpy does not have: {value.dtype} of onnx.TensorProto"
        )
    return np.dtype(value.dtype)


def computed(value: gs.Tensor) -> gs.Variable:
    """A value that is no constant, so that a node may compute it and its shape and type may be set."""
    if not isinstance(value, gs.Variable):
        raise PreconditionError(f"{value.name} is a constant")
    return value


def constant_values(value: gs.Tensor) -> NDArray[np.generic]:
    """The numbers of a constant."""
    if not isinstance(value, gs.Constant):
        raise PreconditionError(f"{value.name} is computed, not a constant")
    held = value._values
    return held.load() if isinstance(held, Computed) else value.values


def release_values(value: gs.Tensor) -> None:
    """Let go of the pages of a constant's numbers that a file holds; they are read again when they are needed."""
    held = value._values if isinstance(value, gs.Constant) else None
    held = held.like if isinstance(held, Computed) else held
    if isinstance(held, np.ndarray) and held.size:
        first = held.__array_interface__["data"][0]
        release_spans([span_of(first, held.itemsize, held.shape, held.strides)])


def float_values(value: gs.Tensor) -> NDArray[np.float32]:
    """The numbers of a constant in single precision, as they are stored."""
    values = constant_values(value)
    if values.dtype != np.float32:
        raise PreconditionError(f"{value.name} holds {values.dtype}, not float32")
    return values.astype(np.float32, copy=False)


def double_values(value: gs.Tensor) -> NDArray[np.float64]:
    """The numbers of a constant of any type, in double precision."""
    return np.asarray(constant_values(value), np.float64)


def produced_by(value: gs.Tensor, op: str) -> gs.Node:
    """The node that computes a value, which is an ``op``."""
    if not value.inputs or value.inputs[0].op != op:
        raise PreconditionError(f"{value.name} does not come from {op}")
    return value.inputs[0]


def int_attribute(node: gs.Node, name: str, default: int | None = None) -> int:
    """A whole number.

    Args:
        default: Where the node does not say; None if it has to.
    """
    value = node.attrs.get(name, default)
    if not isinstance(value, int):
        raise PreconditionError(f"{node.name}: {node.op} needs a whole number as {name}, got {value}")
    return value


def float_attribute(node: gs.Node, name: str, default: float) -> float:
    """A real number."""
    value = node.attrs.get(name, default)
    if not isinstance(value, int | float):
        raise PreconditionError(f"{node.name}: {node.op} needs a number as {name}, got {value}")
    return float(value)


def ints_attribute(node: gs.Node, name: str) -> list[int] | None:
    """Whole numbers; None where the node does not say."""
    value = node.attrs.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
        raise PreconditionError(f"{node.name}: {node.op} needs whole numbers as {name}, got {value}")
    return [int(item) for item in value]
