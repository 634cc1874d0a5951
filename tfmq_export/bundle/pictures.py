"""``OUT/tfmq/pictures.npz``: images of both models from the same noise, for the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import LoadError

NAME = "pictures.npz"


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Small enough to look at. All are uint8.

    Attributes:
        reference: Drawn by the full-precision model, [N, H, W, C], C of 1 or 3.
        compiled: Drawn by the compiled graph.
        reference_states: What the sampler held on the way, [F, N, h, w, C]; F is 0 where that is no picture.
        compiled_states: The same of the compiled graph.
        calls: Before which model call each state is, counted from 0, [F].
    """

    reference: NDArray[np.uint8]
    compiled: NDArray[np.uint8]
    reference_states: NDArray[np.uint8]
    compiled_states: NDArray[np.uint8]
    calls: NDArray[np.int64]

    def save(self, root: Path) -> None:
        """Write them into a bundle."""
        arrays = {name: getattr(self, name) for name in self.__slots__}
        np.savez_compressed(root / "tfmq" / NAME, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, root: Path) -> Self | None:
        """Those of a bundle; None where it draws none.

        Raises:
            LoadError: the file cannot be read.
        """
        path = root / "tfmq" / NAME
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls.__slots__})
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(f"{path}: not readable ({error!r}); compile the model again") from error
