"""Memory that nobody needs any more, given back to the system: pages of a mapped checkpoint, and what was freed."""

import ctypes
import mmap
import sys

import numpy as np
from numpy.typing import NDArray

PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux: pages of a file are dropped and read again when they are needed; nothing is lost."""


def release_freed() -> None:
    """Give back what the allocator keeps of freed memory; an engine that closes leaves as much as it held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc
        trim(0)


def release_span(first: int, end: int) -> None:
    """Let go of the whole pages between two addresses where a file holds them, so that others find room.

    What no file holds stays. On systems that cannot be asked, everything stays.
    """
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (end - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0 and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), PAGEOUT)


def release_array(values: NDArray[np.generic]) -> None:
    """The same of an array, which may be a view."""
    first: int = values.__array_interface__["data"][0]
    reach = [(size - 1) * stride for size, stride in zip(values.shape, values.strides, strict=True)]
    release_span(
        first + sum(min(each, 0) for each in reach), first + sum(max(each, 0) for each in reach) + values.itemsize
    )
