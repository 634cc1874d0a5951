"""Accuracy and latency of graphs on engines: judged on held-out calls, timed in turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from engines import Call, Engine, Feeds
from numpy.typing import NDArray
from peer_report import Result

from tfmq_export.bench.peers import batches_of
from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.runtime.measure.benchmark import speedups, time_interleaved
from tfmq_export.runtime.measure.compare import sqnr_db


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A graph and the engines it is run on.

    Attributes:
        name: How it was made.
        path: Alone in its folder with its weights.
        make: Writes it.
        bundle: Whether its timestep is a vector even where the module's is a number.
    """

    name: str
    path: Path
    engines: tuple[Engine, ...]
    make: Callable[[], None]
    bundle: bool = False

    def feeds(self, call: Feeds) -> Feeds:
        """Inputs of the module as inputs of this graph."""
        return {name: value.reshape(-1) if self.bundle and not value.ndim else value for name, value in call.items()}

    def size(self) -> int:
        """Bytes of graph and weights."""
        return sum(file.stat().st_size for file in self.path.parent.iterdir() if file.suffix != ".json")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A graph on an engine."""

    graph: Graph
    engine: Engine

    @property
    def name(self) -> str:
        return f"{self.graph.name} on {self.engine.describe()}"


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """One timestep of a trajectory that no candidate was calibrated on.

    Attributes:
        calls: Inputs of the model, one benchmark batch each.
        prediction: Of the float module, [N, ...].
    """

    calls: tuple[Feeds, ...]
    prediction: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rounds:
    """How long candidates take turns.

    Attributes:
        threads: Of one inference.
        seconds: No round starts after this long; one always runs.
    """

    threads: int
    count: int
    seconds: float = math.inf


def hold_out(steps: Sequence[CalibrationStep], batch: int) -> list[HeldOut]:
    """Recorded calls, cut into batches; samples that fill no batch are left out."""
    found = []
    for step in steps:
        calls = batches_of(step, batch)
        found.append(HeldOut(calls, step.prediction[: len(calls) * batch].numpy()))
    return found


def measure(
    candidates: Sequence[Candidate],
    held_out: Sequence[HeldOut],
    rounds: Rounds,
    failures: dict[str, str],
) -> list[Result]:
    """Accuracy of every candidate on the held-out calls, then latency, all in turn.

    Args:
        candidates: The baseline first.
        failures: Takes the candidates that cannot run, by name, with the reason.
    """
    calls: dict[str, Callable[[], object]] = {}
    accuracy: dict[str, tuple[float, ...]] = {}
    by_name = {candidate.name: candidate for candidate in candidates}
    for name, candidate in by_name.items():
        graph, example = candidate.graph, candidate.graph.feeds(held_out[0].calls[0])
        try:
            call = candidate.engine.open(graph.path, rounds.threads, example)
            accuracy[name] = judge(call, graph, held_out)
        except Exception as error:  # whatever an engine raises on a graph it cannot run
            failures[name] = one_line(error)
            continue
        calls[name] = partial(call, example)
    timings = time_interleaved(calls, rounds=rounds.count, seconds_budget=rounds.seconds)
    ratios = speedups(timings, candidates[0].name)
    return [
        Result(
            made_by=by_name[name].graph.name,
            engine=by_name[name].engine.describe(),
            threads=rounds.threads,
            timing=timings[name],
            speedup=ratios[name],
            file_bytes=by_name[name].graph.size(),
            sqnr=accuracy[name],
        )
        for name in calls
    ]


def judge(call: Call, graph: Graph, held_out: Sequence[HeldOut]) -> tuple[float, ...]:
    """SQNR of the noise prediction against the float module, dB, one per timestep."""
    return tuple(
        sqnr_db(step.prediction, np.concatenate([np.array(call(graph.feeds(feeds))) for feeds in step.calls]))
        for step in held_out
    )


def one_line(error: Exception) -> str:
    """Kind and message, cut to what fits a report."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
