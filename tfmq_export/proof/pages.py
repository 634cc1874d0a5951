"""Memory that a mapped checkpoint takes while nobody reads it."""

import ctypes
import mmap
import sys

from torch import nn

PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux: pages of a file are dropped and read again when they are needed; nothing is lost."""


def release_pages(module: nn.Module) -> None:
    """Let go of the pages of a module's weights that a file holds, so that an engine finds room beside them.

    Weights that no file holds stay. On systems that cannot be asked, everything stays.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    for weight in module.parameters():
        start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (weight.data_ptr() + weight.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0 and weight.device.type == "cpu":
            advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), PAGEOUT)
