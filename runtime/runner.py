"""What every engine offers: named arrays in, named arrays out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """A graph, and how it is to run.

    Attributes:
        backend: The name that the engine was asked for by.
        threads: Of one inference on a CPU; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
        precision: What computes where nothing is quantized, on an engine that leaves it open; None takes its usual.
        bundle: Which the graph lies in, for engines that run what was built from it.
    """

    graph: Path
    backend: str
    threads: int | None = None
    integer: bool = True
    precision: str | None = None
    bundle: Bundle | None = None


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
