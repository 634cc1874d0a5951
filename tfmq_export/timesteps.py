"""The finite, ordered set of timesteps one sampler visits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import ConfigError, TimestepError


@dataclass(frozen=True, slots=True)
class TimestepSet:
    """Timesteps in sampling order; integers, or reals for real-valued schedules.

    Attributes:
        values: All distinct. Reals are float32 values, compared exactly.
        real: Whether the model takes a float timestep.
    """

    values: tuple[int, ...] | tuple[float, ...]
    real: bool = False

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("a schedule needs at least one timestep")
        if len(set(self.values)) != len(self.values):
            raise ConfigError("a schedule visits each timestep once; this one repeats a value")
        if not np.isfinite(np.asarray(self.values, np.float64)).all():
            raise ConfigError("every timestep must be finite")
        if not self.real and any(int(value) != value for value in self.values):
            raise ConfigError("fractional timesteps need a real-valued schedule")

    @classmethod
    def of(cls, values: object) -> "TimestepSet":
        """Take timesteps from any sequence or array; real if their type is."""
        array = np.asarray(values).reshape(-1)
        if array.dtype.kind in "iu":
            return cls(tuple(int(value) for value in array))
        if array.dtype.kind != "f":
            raise ConfigError(f"timesteps must be numbers, got {array.dtype}")
        return cls(tuple(float(value) for value in array.astype(np.float32)), real=True)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def array(self) -> NDArray[np.int64] | NDArray[np.float32]:
        """The timesteps, [T]."""
        if self.real:
            return np.asarray(self.values, np.float32)
        return np.asarray(self.values, np.int64)

    def rows(self, timesteps: NDArray[np.generic]) -> NDArray[np.int64]:
        """Row of each timestep in the set, [N].

        Raises:
            TimestepError: names the first timestep that is not in the set.
        """
        wanted = np.asarray(timesteps).reshape(-1)
        if self.real:
            wanted = wanted.astype(np.float32)
        # Nearly every call asks for one; building arrays would be a third of what a call costs outside the engine.
        if wanted.size == 1 and (value := wanted.item()) in self.values:
            return np.asarray([self.values.index(value)], np.int64)
        hits = wanted[:, None] == self.array[None, :]  # [N, T]
        missing = ~hits.any(1)
        if missing.any():
            raise TimestepError(
                f"timestep {wanted[missing][0]:g} is not in this schedule of {len(self)} steps ({self.describe()}); "
                "compile with the --steps and scheduler you sample with"
            )
        return np.asarray(hits.argmax(1), np.int64)

    def describe(self) -> str:
        """A few of the values, for messages."""
        shown = [f"{value:g}" for value in self.values]
        return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
