"""Drawing with any scheduler whose steps are linear, in numpy: Euler, Heun, DPM++, UniPC, PLMS, flow matching.

Such a scheduler never looks at its numbers, it only weighs them: the sample of each call is

    x_k = m_k0 x_T + sum over j < k of m_kj+1 e_j

with the starting noise ``x_T`` and the predictions ``e_j`` so far. The weights follow from the schedule alone; the
compiler reads them off the scheduler's own code (``models/linear_walk.py``) and stores them in the bundle. What clips,
sorts or draws new noise on the way is not linear and has no such file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import LoadError

FILE = "tfmq/walk.npz"
"""Of a bundle, where its scheduler is linear."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearWalk:
    """The walk from noise to image.

    Attributes:
        timesteps: Of each call, [S]; whole numbers are int64.
        weights: Of noise and predictions in the sample that each call gets, and at last in the image, [S + 1, S + 1].
    """

    timesteps: NDArray[np.generic]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        calls = len(self.timesteps)
        fits = self.timesteps.shape == (calls,) and self.weights.shape == (calls + 1, calls + 1)
        if not fits or not calls or not np.isfinite(self.weights).all() or np.triu(self.weights, 1).any():
            raise LoadError(f"weights {list(self.weights.shape)} for {calls} calls, or of predictions still to come")

    @classmethod
    def read(cls, bundle: Bundle) -> "LinearWalk | None":
        """Of a bundle; None where its scheduler is not linear.

        Raises:
            LoadError: the file is damaged or altered.
        """
        if FILE not in bundle.manifest.files:
            return None
        bundle.verify_file(FILE)
        path = bundle.root / FILE
        stored = read_arrays(path)
        try:
            return cls(stored["timesteps"], np.asarray(stored["weights"], np.float64))
        except (KeyError, ValueError, LoadError) as error:
            raise LoadError(f"{path}: not the walk of a scheduler: {error}") from error

    def save(self, path: Path) -> None:
        """Write it as arrays."""
        np.savez(path, allow_pickle=False, timesteps=self.timesteps, weights=self.weights)

    def start(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sample of the first call, [N, ...]."""
        return self.mixed(0, [noise])

    def mixed(self, call: int, seen: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The sample of a call, or the image behind the last one, [N, ...].

        Args:
            seen: The noise, and every prediction so far.
        """
        total = np.zeros(seen[0].shape, np.float64)
        for weight, values in zip(self.weights[call], seen, strict=False):
            if weight:
                total += weight * values
        return total.astype(np.float32)
