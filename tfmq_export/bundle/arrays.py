"""Arrays of an ``.npz`` file: numbers alone, so that nothing in it runs."""

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import LoadError, first_line

DAMAGED = (
    OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, SyntaxError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip
"""What numpy and zipfile raise on bytes that are no such file, or that claim to be larger than memory."""


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Every array of a file, by name.

    Raises:
        LoadError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (*DAMAGED, AttributeError) as error:  # a bare .npy has no names
        raise LoadError(f"{path}: not a readable npz file: {first_line(error)}") from error
