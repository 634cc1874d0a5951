"""One candidate in a process of its own: ``python -m tfmq_export.bench.worker``, spoken to in lines of JSON.

The first line in is the job, the answer ``Ready``, with its accuracy where that is asked for; then each ``turn`` is
answered by a ``Turn``, and ``close`` by the peak of memory. A candidate that cannot run answers with the reason.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bench.job import PREDICTION, Job, Ready, Turn
from tfmq_export.bundle import manifest as bundle
from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.runtime.engines.open import engine_version
from tfmq_export.runtime.engines.table import engine_named
from tfmq_export.runtime.measure.benchmark import peak_rss_bytes, rss_bytes
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.runtime.runner import GraphRequest, ReportsSettings, Runner, one_line
from tfmq_export.runtime.sampler import DdimSchedule, guided, prompted, sample, schedule_of

Denoise = Callable[..., NDArray[Any]]
"""``denoise(sample, timestep, **conditioning) -> prediction``."""


class Meter:
    """Adds up the seconds that calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return counted


class MeteredRunner:
    """A runner whose calls are counted."""

    def __init__(self, inner: Runner, meter: Meter) -> None:
        self._inner = inner
        self.inputs, self.outputs, self.engine = inner.inputs, inner.outputs, inner.engine
        self._infer = meter.timed(inner.infer)

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        result: dict[str, NDArray[np.generic]] = self._infer(feeds)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, traceback)


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A candidate ready to predict; ``settings`` says what it runs on, once it has run."""

    denoise: Denoise
    settings: Callable[[], Mapping[str, str]]
    graphs: tuple[Path, ...] = ()


def main() -> None:
    """Answer until the parent says ``close`` or goes away."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        serve(Job.from_line(sys.stdin.readline()), sys.stdin, answers)
    except Exception as error:  # whatever a library raises is the answer
        answer(answers, {"error": f"{type(error).__name__}: {one_line(error)}"[:400]})


def serve(job: Job, questions: TextIO, answers: TextIO) -> None:
    """Load, be judged, then one turn for each question."""
    import_libraries(job)
    meter, libraries = Meter(), rss_bytes()
    with np.load(job.inputs, allow_pickle=False) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    start = time.perf_counter()
    opened = open_candidate(job, meter)
    call = single_call(opened.denoise, job, inputs)
    call()
    seconds = time.perf_counter() - start
    sqnr = tuple(judged(opened.denoise, job))
    answer(answers, asdict(Ready(seconds, libraries, dict(opened.settings()), bytes_of(opened.graphs), sqnr)))
    turn = call if job.sampling is None else partial(sampling_run, opened.denoise, job, inputs)
    for question in questions:
        if question.strip() == "close":
            answer(answers, {"peak_bytes": peak_rss_bytes()})
            return
        answer(answers, asdict(timed_turn(turn, meter)))


def answer(stream: TextIO, data: Mapping[str, object]) -> None:
    """One line."""
    stream.write(json.dumps(data) + "\n")
    stream.flush()


def timed_turn(turn: Callable[[], object], meter: Meter) -> Turn:
    """One turn on three clocks."""
    meter.seconds = 0.0
    cpu, start = time.process_time(), time.perf_counter()
    turn()
    seconds = time.perf_counter() - start
    return Turn(seconds, meter.seconds, time.process_time() - cpu)


def single_call(denoise: Denoise, job: Job, inputs: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
    """One prediction at the first timestep, as large as the turns will ask for; the prompt is prepared before."""
    halves = 2 if guidance_of(job, inputs) != 1 else 1  # a plain export has its batch fixed
    conditioning = {name: np.concatenate([value] * halves) for name, value in conditioning_of(job, inputs).items()}
    step = prompted(denoise, conditioning)
    return partial(step, np.concatenate([inputs[job.sample]] * halves), inputs[job.timestep].item())


def judged(denoise: Denoise, job: Job) -> Iterator[float]:
    """SQNR of the prediction against the float model's, dB, at each held-out timestep.

    The calls are those of a turn: as large, the timestep a number. One timestep is in memory at a time, so that peaks
    stay the candidate's own.
    """
    for path in sorted(Path(job.held_out).iterdir()) if job.held_out is not None else ():
        with np.load(path, allow_pickle=False) as arrays:
            inputs = dict(arrays)
        wanted, samples, timesteps = (inputs.pop(name) for name in (PREDICTION, job.sample, job.timestep))
        given = [
            denoise(sample, timesteps.flat[0].item(), **{name: calls[index] for name, calls in inputs.items()})
            for index, sample in enumerate(samples)
        ]
        yield sqnr_db(wanted, np.concatenate(given))


def bytes_of(graphs: tuple[Path, ...]) -> int:
    """Graphs and weights; each has a folder of its own."""
    files = [file for graph in graphs for file in graph.parent.iterdir() if file.suffix != ".json" and file.is_file()]
    return sum(file.stat().st_size for file in files)


def sampling_run(denoise: Denoise, job: Job, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Noise to images, prompt included."""
    assert job.sampling is not None
    schedule = _schedule(job.sampling.bundle)
    conditioning = conditioning_of(job, inputs)
    null = {name: inputs[f"{name}.unconditional"] for name in conditioning if f"{name}.unconditional" in inputs}
    scale = guidance_of(job, inputs)
    step = prompted(denoise, conditioning) if scale == 1 else guided(denoise, conditioning, null, scale)
    return sample(step, inputs[job.sample], schedule)


@lru_cache
def _schedule(root: str) -> DdimSchedule | LinearWalk:
    """Of a bundle; read once, for runs are timed."""
    schedule = schedule_of(bundle.open_bundle(Path(root)))
    assert schedule is not None  # refused before
    return schedule


def guidance_of(job: Job, inputs: Mapping[str, NDArray[Any]]) -> float:
    """The scale of a whole run; 1 without guidance, and for single calls."""
    has_null = any(name.endswith(".unconditional") for name in inputs)
    return job.sampling.guidance_scale if job.sampling is not None and has_null else 1.0


def conditioning_of(job: Job, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What is neither sample nor timestep nor "no prompt"."""
    other = (job.sample, job.timestep)
    return {name: value for name, value in inputs.items() if name not in other and not name.endswith(".unconditional")}


def import_libraries(job: Job) -> None:
    """Before the clock starts, and nothing a candidate does not need: torch alone is some hundred MB."""
    if job.kind.startswith("torch"):
        import torch

        importlib.import_module("diffusers")
        torch.set_num_threads(job.threads)
        torch.set_num_interop_threads(1)
    elif job.kind == "bundle" and job.backend == "auto":
        engine_version(bundle.open_bundle(Path(job.path)).manifest.target)
    else:
        engine_named(job.backend).versions[job.backend]()


def open_candidate(job: Job, meter: Meter) -> Opened:
    """Load what the job names."""
    openers = {"bundle": open_bundle, "graph": open_graph, "torch": open_torch, "torch-compile": open_torch}
    return openers[job.kind](job, meter)


def open_bundle(job: Job, meter: Meter) -> Opened:
    """As a user opens it."""
    from tfmq_export.runtime import load

    precision = job.precision if job.backend == "openvino" else None
    loaded = load(Path(job.path), backend=job.backend, threads=job.threads, precision=precision)
    prologue = None if loaded.prologue is None else MeteredRunner(loaded.prologue, meter)
    metered = replace(loaded, runner=MeteredRunner(loaded.runner, meter), prologue=prologue)
    graphs = [graph for graph in (loaded.bundle.model, loaded.bundle.prologue) if graph is not None]
    return Opened(metered, partial(settings_of, loaded.runner), tuple(graphs))


def open_graph(job: Job, meter: Meter) -> Opened:
    """A graph file on the same engine, with the same options, as a bundle's."""
    request = GraphRequest(Path(job.path), job.backend, threads=job.threads, precision=job.precision)
    runner = engine_named(job.backend).open_graph(request)
    infer = meter.timed(runner.infer)
    with np.load(job.inputs, allow_pickle=False) as arrays:
        dtype = arrays[job.timestep].dtype

    def denoise(noisy: NDArray[Any], timestep: Any, **conditioning: NDArray[Any]) -> NDArray[Any]:
        shape = () if job.scalar_timestep else (len(noisy),)
        values = infer({job.sample: noisy, job.timestep: np.full(shape, timestep, dtype), **conditioning})
        return np.asarray(next(iter(values.values())))

    return Opened(denoise, partial(settings_of, runner), (Path(job.path),))


def open_torch(job: Job, meter: Meter) -> Opened:
    """The module itself, eager or compiled with inductor's defaults."""
    import torch

    from tfmq_export.models.load import Source, load

    source = {**job.source, "path": Path(job.source["path"])}
    for name in ("conditioning", "prompts", "pipeline"):
        if source.get(name) is not None:
            source[name] = Path(source[name])
    denoiser = load(Source(**source))
    if job.kind == "torch-compile":
        denoiser.module.compile()
    predict = meter.timed(denoiser.module_denoise())

    def denoise(noisy: NDArray[Any], timestep: Any, **conditioning: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in conditioning.items()}
            result: NDArray[Any] = predict(torch.from_numpy(noisy), timestep, **given).numpy()
            return result

    mode = "eager" if job.kind == "torch" else "torch.compile"
    ran = {"engine": f"torch {torch.__version__}, {mode}", "precision": "float32"}
    return Opened(denoise, lambda: {**ran, "threads": str(torch.get_num_threads())})


def settings_of(runner: Runner) -> Mapping[str, str]:
    """The engine's own account, where it gives one."""
    return runner.settings() if isinstance(runner, ReportsSettings) else {"engine": runner.engine}


if __name__ == "__main__":
    main()
