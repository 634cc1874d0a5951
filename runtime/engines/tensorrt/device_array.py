"""Arrays that lie on a GPU, exchanged by address with torch, CuPy, Numba and whoever else speaks
``__cuda_array_interface__`` (version 3)."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tfmq_export.errors import ConfigError


@runtime_checkable
class OnDevice(Protocol):
    """An array on a GPU: ``torch.Tensor``, ``cupy.ndarray``, ``DeviceArray``."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A contiguous array on a GPU; it does not own the memory.

    Attributes:
        address: Of its first element.
        stream: The stream whose work fills it; readers on another stream wait for that one first.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            # 0 would be ambiguous; 1 is the legacy default stream.
            "stream": self.stream or 1,
        }

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Consecutive rows of the first axis, such as ``timesteps[3:4]``; the same memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1 or stop <= start:
            raise ConfigError(f"rows {start}:{stop}:{step} of {self.shape[0]}: take consecutive ones, at least one")
        row = self.nbytes // self.shape[0]
        return DeviceArray(self.address + start * row, (stop - start, *self.shape[1:]), self.dtype, self.stream)


def as_device_array(name: str, value: OnDevice) -> DeviceArray:
    """See an array of any library as one of ours.

    Raises:
        ConfigError: it is not contiguous.
    """
    facts = value.__cuda_array_interface__
    shape, dtype = tuple(facts["shape"]), np.dtype(facts["typestr"])
    strides = facts.get("strides")
    if strides is not None and tuple(strides) != _contiguous(shape, dtype.itemsize):
        raise ConfigError(f"{name}: its rows are not contiguous on the device; make it contiguous")
    return DeviceArray(int(facts["data"][0]), shape, dtype, int(facts.get("stream") or 0))


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes, row by row."""
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides) if shape else ()
