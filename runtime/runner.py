"""What every engine offers: named arrays in, named arrays out."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """A compiled graph held by one engine: ``with runner: runner.infer(feeds)``.

    Attributes:
        inputs: Names of the graph's inputs, in order.
        outputs: Names of its outputs.
        engine: What runs it, with its version and what it computes in, for reports.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    engine: str

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the graph once; keys are the names of its inputs and outputs."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@runtime_checkable
class ReportsSettings(Protocol):
    """A runner that says what it really runs on."""

    def settings(self) -> dict[str, str]:
        """Engine with version, threads, precision: the engine's own words, not what was asked for."""
        ...


@runtime_checkable
class BuiltForBatches(Protocol):
    """A runner whose engine takes certain batches only."""

    def smallest_batch(self, name: str) -> int:
        """Rows that an input has at least."""
        ...


def one_line(message: object) -> str:
    """An engine's message without its line breaks and closing full stop."""
    return " ".join(str(message).split()).rstrip(".")
