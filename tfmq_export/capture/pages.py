"""Memory that nobody needs any more, given back to the system: pages of a mapped checkpoint, and what was freed."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux: pages of a file are dropped and read again when they are needed; nothing is lost."""


def release_freed() -> None:
    """Give back what the allocator keeps of freed memory; an engine that closes leaves as much as it held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc
        trim(0)


def release_pages(weights: Iterable[Tensor]) -> None:
    """Let go of the pages of weights that a file holds, so that others find room beside them.

    Weights that no file holds stay. On systems that cannot be asked, everything stays.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    for weight in weights:
        if weight.device.type != "cpu" or not weight.numel():
            continue
        last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        end = weight.data_ptr() + (last + 1) * weight.element_size()
        start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (end - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), PAGEOUT)
