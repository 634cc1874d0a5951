"""What was measured, as data, as a table and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tfmq_export.bench.job import Ready, Turn
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.runtime.measure.benchmark import Timing
from tfmq_export.runtime.measure.compare import Comparison, Metric, json_number
from tfmq_export.runtime.measure.machine import adds_in_16_bits, features, processor, versions

LATENCY = ("", "median ms", "p10", "p90", "p99", "speed", "per s")
ACCURACY = ("SQNR dB", "worst")
COSTS = ("", "cpu ms", "cores", "ours", "load s", "peak MB", "file MB")
"""Columns of the two tables, the first with ``ACCURACY`` where that was judged; ``Row`` says what they are."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A candidate that was asked for and could not be timed."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate in one setting.

    Attributes:
        graph: Hash of the graph of a bundle of ours; empty for a baseline.
        timing: Of its turns.
        speedup: Times faster than the baseline: the median of the ratios within rounds.
        turns: The same turns on all clocks.
        peak_bytes: Of its process; None where the system does not tell.
    """

    name: str
    graph: str
    timing: Timing
    speedup: float
    turns: tuple[Turn, ...]
    ready: Ready
    peak_bytes: int | None

    @property
    def bundle(self) -> bool:
        """Whether it is one of ours, not a baseline."""
        return bool(self.graph)

    @property
    def cpu_seconds(self) -> float:
        """Of all threads, per turn: on a busy machine steadier than the time that passes."""
        return float(np.median([turn.cpu_seconds for turn in self.turns]))

    @property
    def cores(self) -> float:
        """How many cores were busy: CPU seconds per second."""
        return float(np.median([turn.cpu_seconds / turn.seconds for turn in self.turns]))

    @property
    def overhead(self) -> float:
        """Time outside the engine, as a share of the time inside: our checks, schedule, guidance."""
        return float(np.median([turn.seconds / turn.engine_seconds - 1 for turn in self.turns]))

    @property
    def overhead_seconds(self) -> float:
        """The same per turn, in seconds."""
        return float(np.median([turn.seconds - turn.engine_seconds for turn in self.turns]))

    @property
    def accuracy(self) -> Comparison | None:
        """Of the prediction at each held-out timestep; None where it was not judged."""
        return Comparison(Metric.STEP_SQNR, tuple(self.ready.sqnr)) if self.ready.sqnr else None

    def to_json(self, batch: int) -> dict[str, object]:
        """Plain data; seconds, bytes and dB."""
        judged = self.accuracy
        return {
            "seconds": self.timing.to_json(),
            "speedup": self.speedup,
            "samples_per_second": batch / self.timing.median,
            "cpu_seconds": self.cpu_seconds,
            "cores": self.cores,
            "overhead": self.overhead,
            "overhead_seconds": self.overhead_seconds,
            "load_seconds": self.ready.load_seconds,
            "libraries_bytes": self.ready.libraries_bytes,
            "peak_bytes": self.peak_bytes,
            "file_bytes": self.ready.file_bytes,
            "sqnr_db": None if judged is None else _plain(judged),
            "ran": dict(self.ready.ran),
            "graph_sha256": self.graph,
        }

    def latency(self, batch: int) -> tuple[str, ...]:
        """One cell per column of ``LATENCY``, and of ``ACCURACY`` where it was judged."""
        timing, judged = self.timing, self.accuracy
        times = [_short(value * 1e3) for value in (timing.median, timing.p10, timing.p90, timing.p99)]
        accuracy = () if judged is None else (f"{judged.mean:.1f}", f"{judged.lowest:.1f}")
        return (self.name, *times, f"{self.speedup:.2f}x", _short(batch / timing.median), *accuracy)

    def costs(self) -> tuple[str, ...]:
        """One cell per column of ``COSTS``."""
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}"
        cpu, load = _short(self.cpu_seconds * 1e3), f"{self.ready.load_seconds:.2f}"
        file = f"{self.ready.file_bytes / 1e6:.2f}" if self.ready.file_bytes else "-"
        return (self.name, cpu, f"{self.cores:.2f}", f"{self.overhead:.1%}", load, peak, file)

    def ran(self) -> str:
        """What really ran, in one line."""
        return ", ".join(value if key == "engine" else f"{key} {value}" for key, value in self.ready.ran.items())


def setting_title(threads: int, batch: int) -> str:
    """What all candidates of a setting have in common, in words."""
    return f"batch {batch}, {threads} thread{'s' * (threads != 1)}"


@dataclass(frozen=True, slots=True)
class Setting:
    """All candidates with one number of threads and one batch size.

    Attributes:
        base: Name of the row that speed is a multiple of.
    """

    threads: int
    batch: int
    base: str
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]

    @property
    def title(self) -> str:
        """What its candidates have in common, in words."""
        return setting_title(self.threads, self.batch)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of its rows' latencies."""
        return LATENCY if self.rows[0].accuracy is None else LATENCY + ACCURACY

    @property
    def rounds(self) -> int:
        return self.rows[0].timing.count

    def no_faster(self) -> str:
        """Which bundles gain no speed on this processor, and why that may be; empty where all do."""
        slow = [row.name for row in self.rows if row.bundle and row.name != self.base and row.speedup <= 1]
        if not slow:
            return ""
        why = ": without VNNI it has no fast 8-bit products, so the gain is size" if adds_in_16_bits() else ""
        return f"no faster than {self.base} on this processor{why}: {', '.join(slow)}"

    def ran(self) -> dict[str, list[str]]:
        """Names of the candidates that ran on the same, by what that is."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            found.setdefault(row.ran(), []).append(row.name)
        return found


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A whole run.

    Attributes:
        about: What was measured and where, by heading.
        unit: What a turn is: "call" or "sampling run".
    """

    about: Mapping[str, str]
    unit: str
    settings: tuple[Setting, ...]

    @classmethod
    def of(cls, bundles: Sequence[Bundle], sampling: bool, settings: Sequence[Setting]) -> "BenchReport":
        """With what the machine says of itself."""
        manifest = bundles[0].manifest
        steps = f"{manifest.sampler.kind}, {manifest.sampler.steps} steps"
        scale = manifest.sampler.guidance_scale
        unit = f"sampling run ({steps}{'' if scale == 1 else f', guidance {scale:g}'})" if sampling else "call"
        about = {
            "bundles": ", ".join(str(bundle.root) for bundle in bundles),
            "processor": processor(),
            "instructions": features(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
        return cls(about, unit, tuple(settings))

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "about": dict(self.about),
            "unit": self.unit,
            "settings": [
                {
                    "threads": setting.threads,
                    "batch": setting.batch,
                    "rounds": setting.rounds,
                    "baseline": setting.base,
                    "no_faster": setting.no_faster(),
                    "candidates": {row.name: row.to_json(setting.batch) for row in setting.rows},
                    "not_run": {item.name: item.reason for item in setting.missing},
                }
                for setting in self.settings
            ],
        }


def _plain(judged: Comparison) -> dict[str, object]:
    each = [json_number(value) for value in judged.values]
    return {"mean": json_number(judged.mean), "worst": json_number(judged.lowest), "per_timestep": each}


def _short(value: float) -> str:
    """Four digits: more are noise."""
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, min(digits, 3))}f}"
