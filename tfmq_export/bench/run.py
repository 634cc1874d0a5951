"""All candidates, all threads and batch sizes: load, take turns, put together what was found."""

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_export.bench.candidates import Candidate
from tfmq_export.bench.lockstep import Worker
from tfmq_export.bench.report import BenchReport, Missing, Row, Setting, setting_title
from tfmq_export.bench.workshop import CALIBRATION_SEED, Workshop
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import BuildError, ConfigError, TfmqError
from tfmq_export.limits import MOST_IMAGES, MOST_THREADS
from tfmq_export.progress import Progress
from tfmq_export.runtime.measure.benchmark import speedups, take_turns
from tfmq_export.runtime.runner import one_line

if TYPE_CHECKING:
    from tfmq_export.bench.float_model import Model

WARMUP = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        threads: Of one inference; each number in a table of its own.
        batches: Samples per call, or images per sampling run.
        rounds: Turns of every candidate.
        seconds: For the turns of all settings together; a setting runs one round at least.
        sampling: Time whole sampling runs in place of single calls.
        accuracy: Judge every prediction against the float model's, on a trajectory that nothing was calibrated on.
    """

    threads: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 30
    seconds: float = math.inf
    sampling: bool = False
    accuracy: bool = False

    def __post_init__(self) -> None:
        for name, values in (("--threads", self.threads), ("--batch", self.batches)):
            most = MOST_THREADS if name == "--threads" else MOST_IMAGES
            if not values or min(values) < 1 or max(values) > most:
                raise ConfigError(f"{name}: needs whole numbers from 1 to {most}, got {list(values)}")


def bench(
    bundles: Sequence[Bundle],
    model: "Model | None",
    candidates: Sequence[Candidate],
    plan: Plan,
    progress: Progress,
    *,
    keep: Callable[[BenchReport], None],
) -> BenchReport:
    """Measure; candidates that cannot run are reported with the reason.

    Args:
        bundles: Of one model and one schedule; the first one's prompts are sampled.
        keep: Given all results so far after each setting, so that an interrupted run leaves what it has.
    Raises:
        ConfigError: the bundles cannot be compared, or not be judged without the model.
        RecipeError: a bundle was compiled from another model.
        BuildError: nothing could be timed.
    """
    _require_comparable(bundles)
    if plan.accuracy and model is None:
        raise ConfigError("--accuracy: predictions are judged against those of the float model: --against MODEL")
    seed = unseen_seed(bundles) if plan.accuracy else None
    if model is not None:
        with progress.stage("Loading the model"):
            for bundle in bundles:
                model.require_origin_of(bundle)
    settings: list[Setting] = []
    share = plan.seconds / (len(plan.threads) * len(plan.batches))
    with tempfile.TemporaryDirectory() as folder:
        for batch in plan.batches:
            workshop = Workshop(bundles[0], model, Path(folder) / f"batch{batch}", batch, plan.sampling, seed)
            for threads in plan.threads:
                settings.append(_setting(workshop, candidates, threads, plan, share, progress))
                keep(BenchReport.of(bundles, plan.sampling, settings))
    return BenchReport.of(bundles, plan.sampling, settings)


def _require_comparable(bundles: Sequence[Bundle]) -> None:
    first = bundles[0].manifest
    for bundle in bundles[1:]:
        other = bundle.manifest
        for what in ("fingerprint", "sampler", "timesteps"):
            if getattr(other, what) != getattr(first, what):
                raise ConfigError(
                    f"{bundle.root} and {bundles[0].root}: compiled with another {what}; only bundles of one model "
                    "and one schedule can be compared"
                )


def unseen_seed(bundles: Sequence[Bundle]) -> int:
    """The first seed that nothing was calibrated with."""
    seen = {str(CALIBRATION_SEED), *(bundle.manifest.provenance.get("seed") for bundle in bundles)}
    return next(seed for seed in itertools.count() if str(seed) not in seen)


def _setting(
    workshop: Workshop, candidates: Sequence[Candidate], threads: int, plan: Plan, seconds: float, progress: Progress
) -> Setting:
    missing: list[Missing] = []
    title = setting_title(threads, workshop.batch)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        with progress.stage(f"Loading, {title}") as step:
            for number, candidate in enumerate(candidates):
                found = _open(candidate, workshop, threads, number)
                if isinstance(found, Missing):
                    missing.append(found)
                else:
                    workers[candidate.name] = stack.enter_context(found)
                step(number + 1, len(candidates))
        if not workers:
            raise BuildError(f"nothing to time: {missing[0].name}: {missing[0].reason}")
        with progress.stage(f"Taking turns, {title}"):
            turns = {name: worker.turn for name, worker in workers.items()}
            timings = take_turns(
                turns, rounds=plan.rounds, warmup=1 if plan.sampling else WARMUP, seconds_budget=seconds
            )
        base, graphs = next(iter(workers)), {candidate.name: candidate.graph for candidate in candidates}
        ratios = speedups(timings, base)
        rows = tuple(
            Row(
                name=name,
                graph=graphs[name],
                timing=timings[name],
                speedup=ratios[name],
                turns=tuple(worker.turns[-timings[name].count :]),
                ready=worker.ready,
                peak_bytes=worker.close(),
            )
            for name, worker in workers.items()
        )
    return Setting(threads, workshop.batch, base, rows, tuple(missing))


def _open(candidate: Candidate, workshop: Workshop, threads: int, number: int) -> Worker | Missing:
    folder = workshop.folder / f"threads{threads}" / f"{number}"
    folder.mkdir(parents=True)
    try:
        return Worker(candidate.name, candidate.make(workshop, threads), folder)
    except TfmqError as error:
        return Missing(candidate.name, str(error).removeprefix(f"{candidate.name}: "))
    except Exception as error:  # whatever a peer raises on a model it cannot take
        return Missing(candidate.name, f"{type(error).__name__}: {one_line(error)}"[:300])
