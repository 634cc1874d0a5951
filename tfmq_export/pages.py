"""Memory that nobody needs any more, given back to the system: pages of a mapped checkpoint, and what was freed."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux: pages of a file are dropped and read again when they are needed; nothing is lost."""
LEAST = 1 << 20  # bytes that are worth a look


def release_freed() -> None:
    """Give back what the allocator keeps of freed memory; an engine that closes leaves as much as it held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc
        trim(0)


def release_span(first: int, end: int) -> None:
    """Let go of the whole pages between two addresses that a file holds, so that others find room.

    What no file holds stays: it would go to swap. On systems that cannot be asked, everything stays.
    """
    if end - first < LEAST or not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    for low, high in held_by_files(first, end):
        start = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (high - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), PAGEOUT)


def held_by_files(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a span that are mapped from files."""
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        low, high = (int(address, 16) for address in span.split("-"))
        if inode != "0" and low < end and high > first:
            yield max(low, first), min(high, end)


def release_array(values: NDArray[np.generic]) -> None:
    """The same of an array, which may be a view."""
    first: int = values.__array_interface__["data"][0]
    reach = [(size - 1) * stride for size, stride in zip(values.shape, values.strides, strict=True)]
    release_span(
        first + sum(min(each, 0) for each in reach), first + sum(max(each, 0) for each in reach) + values.itemsize
    )
