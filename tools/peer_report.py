"""What ``bench_peers.py`` found, as JSON, Markdown and a table for the console."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from tfmq_export.runtime.measure.benchmark import Timing

COLUMNS = ("graph", "engine", "threads", "ms [p10, p90]", "speed", "MB", "SQNR, dB (worst timestep)")


@dataclass(frozen=True, slots=True)
class Result:
    """One graph on one engine with one number of threads.

    Attributes:
        made_by: How the graph was made.
        engine: Its name, version and hints.
        timing: Of one call.
        speedup: Times faster than the baseline on the same number of threads.
        file_bytes: Of graph and weights.
        sqnr: Of the noise prediction against the float module, dB, one per timestep.
    """

    made_by: str
    engine: str
    threads: int
    timing: Timing
    speedup: float
    file_bytes: int
    sqnr: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """One cell per column of ``COLUMNS``."""
        ms = [1e3 * value for value in (self.timing.median, self.timing.p10, self.timing.p90)]
        return (
            self.made_by,
            self.engine,
            str(self.threads),
            f"{ms[0]:.2f} [{ms[1]:.2f}, {ms[2]:.2f}]",
            f"{self.speedup:.2f}x",
            f"{self.file_bytes / 1e6:.2f}",
            f"{np.mean(self.sqnr):.1f} ({min(self.sqnr):.1f})",
        )

    def to_json(self) -> dict[str, object]:
        """Plain data; seconds, bytes, dB."""
        return {
            "graph": self.made_by,
            "engine": self.engine,
            "threads": self.threads,
            "seconds": self.timing.to_json(),
            "speedup": self.speedup,
            "file_bytes": self.file_bytes,
            "sqnr_db": list(self.sqnr),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole run.

    Attributes:
        about: What was measured and how, by heading: model, baseline, versions, ...
        failures: What could not be made or run, with the reason.
    """

    about: Mapping[str, str]
    results: tuple[Result, ...]
    failures: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "about": dict(self.about),
            "results": [result.to_json() for result in self.results],
            "failures": dict(self.failures),
        }


def markdown(comparison: Comparison) -> str:
    """The run as a document: how it was measured, the table, what failed."""
    lines = [f"- {heading}: {text}" for heading, text in comparison.about.items()]
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(result.cells())} |" for result in comparison.results]
    if comparison.failures:
        lines += ["", "Failed:", "", *(f"- {name}: {reason}" for name, reason in comparison.failures.items())]
    return "\n".join(lines) + "\n"


def console_table(comparison: Comparison) -> Table:
    """The same for the terminal."""
    notes = [f"{heading}: {text}" for heading, text in comparison.about.items()]
    notes += [f"failed: {name}: {reason}" for name, reason in comparison.failures.items()]
    table = Table(caption=Text("\n".join(notes)), caption_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number < len(COLUMNS) - 1)
    for number, result in enumerate(comparison.results):
        if number and comparison.results[number - 1].threads != result.threads:
            table.add_section()
        table.add_row(*(Text(cell) for cell in result.cells()))
    return table
