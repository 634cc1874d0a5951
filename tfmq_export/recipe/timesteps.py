"""The finite, ordered set of timesteps one sampler visits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import ConfigError, TimestepError

LARGEST, LARGEST_REAL = (1 << 63) - 1, float(np.finfo(np.float32).max)
"""Of an int64 and of a float32."""


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
        if not all(abs(value) <= (LARGEST_REAL if self.real else LARGEST) for value in self.values):  # nor NaN
            raise ConfigError("every timestep must be finite, and fit an int64 or a float32")
        if not self.real and any(int(value) != value for value in self.values):
            raise ConfigError("fractional timesteps need a real-valued schedule")

    def __repr__(self) -> str:
        return f"TimestepSet({self.describe()})"

    @classmethod
    def of(cls, values: object) -> "TimestepSet":
        """Take timesteps from any sequence or array; real if their type is."""
        array = np.asarray(values).reshape(-1)
        if array.dtype.kind in "iu":
            return cls(tuple(int(value) for value in array))
        if array.dtype.kind != "f":
            raise ConfigError(f"timesteps must be numbers, got {array.dtype}")
        return cls(tuple(float(value) for value in array.astype(np.float32)), real=True)

    @classmethod
    def visited(cls, values: object) -> "TimestepSet":
        """The timesteps of a walk, in the order of the first visit.

        Multistep warm-ups and second-order schedulers repeat some; schedulers such as Euler hold whole numbers as
        floats. Both are undone here: each once, integers where all are whole.
        """
        array = np.asarray(values).reshape(-1)
        _, first = np.unique(array, return_index=True)
        return cls.of(array[np.sort(first)]).whole()

    def __len__(self) -> int:
        return len(self.values)

    def whole(self) -> "TimestepSet":
        """As integers, where every value is one; else as it is."""
        if self.real and all(value.is_integer() for value in map(float, self.values)):
            return TimestepSet(tuple(int(value) for value in self.values))
        return self

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
                f"timestep {shown(wanted[missing][0])} is not in this schedule of {len(self)} steps "
                f"({self.describe()}); compile with the --steps and scheduler you sample with"
            )
        return np.asarray(hits.argmax(1), np.int64)

    def require(self, timesteps: object, who: str) -> None:
        """Refuse a walk that would leave the set, before it takes the first step.

        Args:
            timesteps: All that will be visited, in order.
            who: Whose they are, for the message.
        Raises:
            TimestepError: names the first timestep that is missing, and lists the others.
        """
        wanted = np.asarray(timesteps).reshape(-1)
        if self.real:
            wanted = wanted.astype(np.float32)
        missing = list(dict.fromkeys(wanted[~np.isin(wanted, self.array)].tolist()))
        if missing:
            others = f" (also {_shortened(missing[1:])})" if len(missing) > 1 else ""
            raise TimestepError(
                f"{who}: timestep {shown(missing[0])} is not in the bundle's table of {len(self)}{others}; the table "
                f"holds {self.describe()}; compile with the --scheduler and --steps you sample with"
            )

    def describe(self) -> str:
        """A few of the values, for messages."""
        return _shortened(self.values)


def shown(timestep: float) -> str:
    """A timestep in six digits, or in as many as give the same float32 again."""
    brief = f"{timestep:g}"
    return brief if np.float32(brief) == np.float32(timestep) else f"{timestep:.9g}"


def _shortened(values: Iterable[float]) -> str:
    each = [shown(value) for value in values]
    return ", ".join(each if len(each) <= 4 else [*each[:2], "...", each[-1]])


def timestep_vector(timesteps: NDArray[Any]) -> NDArray[Any]:
    """Timesteps as graphs take them: [1] where all samples share one, which gathers one table row; else [N]."""
    steps = timesteps.reshape(-1)
    return steps[:1] if (steps == steps[:1]).all() else steps
