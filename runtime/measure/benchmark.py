"""Latency, measured so that two candidates can be compared.

Calls are interleaved: a machine that slows down half way slows down every candidate, and the ratio
within a round stays true.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfmq_export.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each call of one candidate, in the order of the rounds."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ConfigError("a timing needs at least one call")

    @property
    def count(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, percent: float) -> float:
        """Seconds that this share of the calls stays below."""
        return float(np.percentile(self.seconds, percent))

    @property
    def p10(self) -> float:
        return self.percentile(10)

    @property
    def p90(self) -> float:
        return self.percentile(90)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    def to_json(self) -> dict[str, float | int]:
        """Plain data, seconds."""
        return {"median": self.median, "p10": self.p10, "p90": self.p90, "p99": self.p99, "count": self.count}


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A candidate for ``take_turns``: calls, and says how many seconds that took."""

    def turn() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return turn


def take_turns(
    candidates: Mapping[str, Callable[[], float]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds_budget: float = math.inf,
) -> dict[str, Timing]:
    """Call every candidate once per round, each round starting with the next one.

    Args:
        candidates: Each returns the seconds it took.
        warmup: Rounds that are not counted.
        seconds_budget: No new round starts after this time, warm-up included; one round always runs.
    """
    if not candidates:
        raise ConfigError("nothing to measure; name at least one candidate")
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"a measurement needs rounds >= 1 and warmup >= 0, got {rounds} and {warmup}")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + seconds_budget
    for position in range(-warmup, rounds):
        late = time.monotonic() >= deadline
        if late and position > 0:
            break
        if late and position < 0:
            continue
        first = position % len(names)
        for name in names[first:] + names[:first]:
            elapsed = candidates[name]()
            if position >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def speedups(timings: Mapping[str, Timing], baseline: str) -> dict[str, float]:
    """How many times faster than the baseline each candidate is: the median of the ratios within each round."""
    if baseline not in timings:
        raise ConfigError(f"no timing of the baseline {baseline!r}; measured: {', '.join(timings)}")
    base = np.asarray(timings[baseline].seconds)
    for name, timing in timings.items():
        if timing.count != len(base):
            raise ConfigError(f"{name} has {timing.count} rounds, {baseline} {len(base)}; time them together")
    return {name: float(np.median(base / np.asarray(timing.seconds))) for name, timing in timings.items()}


def peak_rss_bytes() -> int | None:
    """Largest memory this program ever held; None where the system does not tell (Windows).

    It never falls: measure each candidate in a process of its own.
    """
    # On Linux getrusage counts from the fork on, so a small child of a large process looks large.
    return _status_bytes("VmHWM") if sys.platform == "linux" else _max_rss_bytes()


def rss_bytes() -> int | None:
    """Memory this process holds now; None where the system does not tell (all but Linux)."""
    return _status_bytes("VmRSS") if sys.platform == "linux" else None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024


def _max_rss_bytes() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others kilobytes
