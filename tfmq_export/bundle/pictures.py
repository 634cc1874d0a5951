"""``OUT/tfmq/pictures.npz``: images of both models from the same noise, for the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.errors import ConfigError, LoadError, TfmqError

NAME = "pictures.npz"


def is_picture(shape: Sequence[int | None]) -> bool:
    """Whether a batch of this shape can be looked at."""
    return len(shape) == 4 and shape[1] in (1, 3)


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

    def __post_init__(self) -> None:
        ends, states = (self.reference, self.compiled), (self.reference_states, self.compiled_states)
        for pair, rank in ((ends, 4), (states, 5)):
            if pair[0].shape != pair[1].shape or any(
                each.dtype != np.uint8 or each.ndim != rank or each.shape[-1] not in (1, 3) for each in pair
            ):
                raise ConfigError(f"shapes {[list(each.shape) for each in pair]}, {pair[0].dtype} and {pair[1].dtype}")
        if self.calls.dtype.kind not in "iu" or self.calls.shape != states[0].shape[:1]:
            raise ConfigError(f"{len(states[0])} states of calls {list(self.calls.shape)}")

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
            arrays: dict[str, Any] = dict(read_arrays(path))
            return cls(**{name: arrays[name] for name in cls.__slots__})
        except (KeyError, TfmqError) as error:
            raise LoadError(f"{path}: no pictures of two models ({error}); compile the model again") from error
