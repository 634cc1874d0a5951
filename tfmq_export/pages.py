"""Memory that nobody needs any more, given back to the system: pages of a mapped checkpoint, and what was freed."""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Span = tuple[int, int]
"""The first address, and the one behind the last."""
PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux: pages of a file are dropped and read again when they are needed; nothing is lost."""
LEAST = 1 << 20  # bytes that are worth a look


def release_freed() -> None:
    """Give back what the allocator keeps of freed memory; an engine that closes leaves as much as it held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc
        trim(0)


def span_of(first: int, itemsize: int, shape: Sequence[int], strides: Sequence[int]) -> Span:
    """Where an array lies, which may be a view.

    Args:
        first: Address of its first element.
        strides: In bytes.
    """
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return first + sum(min(each, 0) for each in reach), first + sum(max(each, 0) for each in reach) + itemsize


def release_spans(spans: Iterable[Span]) -> None:
    """Let go of the whole pages between addresses that a file holds, so that others find room.

    What no file holds stays: it would go to swap. On systems that cannot be asked, everything stays.
    """
    wanted = [(first, end) for first, end in spans if end - first >= LEAST]
    if not wanted or not sys.platform.startswith("linux"):
        return
    advise, mapped = ctypes.CDLL(None).madvise, mapped_files()
    for first, end in wanted:
        for low, high in mapped:
            start = -(-max(low, first) // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (min(high, end) - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0:
                advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), PAGEOUT)


def mapped_files() -> list[Span]:
    """The addresses at which this process has mapped files."""
    found = []
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            low, high = span.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found
