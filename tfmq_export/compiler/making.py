"""How a bundle was made: the command, and what each stage took."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from tfmq_export.progress import Progress, Step
from tfmq_export.runtime.measure.benchmark import peak_rss_bytes

RECORDING = "Recording the model's own trajectory"
WEIGHING = "Weighing the timesteps"
QUANTIZING = "Quantizing"
REWRITING = "Rewriting the graph"
WRITING = "Writing"
"""Titles of the stages that are forecast, before those of the proof (``proof/plan.py``)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the chain.

    Attributes:
        peak_memory_bytes: The most this process ever held, up to the end of the stage: it never falls. None where the
            system does not tell.
    """

    title: str
    seconds: float
    peak_memory_bytes: int | None


class Stopwatch:
    """Passes progress on and notes what each stage took, in ``stages``."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        start = time.perf_counter()
        with self._inner.stage(title) as step:
            yield step
        self.stages.append(Stage(title, round(time.perf_counter() - start, 2), peak_rss_bytes()))

    def expect(self, seconds: Mapping[str, float]) -> None:
        self._inner.expect(seconds)


@dataclass(frozen=True, slots=True)
class Making:
    """For the report.

    Attributes:
        stages: Grows while the work goes on; read at the end.
        command: That makes the bundle again; empty where no command made it.
        expected: What was forecast, as plain data.
    """

    stages: Sequence[Stage] = ()
    command: str = ""
    expected: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain data; seconds and bytes."""
        return {
            "command": self.command,
            "stages": [asdict(stage) for stage in self.stages],
            "peak_memory_bytes": peak_rss_bytes(),
            "expected": dict(self.expected),
        }
