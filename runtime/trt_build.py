"""Build a TensorRT or TensorRT-RTX engine in a process of its own.

TensorRT-RTX builds ahead of time for a list of GPUs on a machine that has none; TensorRT builds for the GPU it finds.
The builder may crash on a graph it does not support, and a crash must not take the compiler with it: so ``trt_child``
does the work, and here is what starts it, reads its log and turns what went wrong into one error.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.trt_child import BuildJob
from tfmq_export.runtime.trt_layers import EngineLayer, parse_layers

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_CHILD = Path(__file__).with_name("trt_child.py")
_WORTH_TELLING = frozenset({"INTERNAL_ERROR", "ERROR", "WARNING"})


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes an input may take: the engine accepts all between the ends and is tuned for the usual one."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.smallest) == len(self.usual) == len(self.largest):
            raise ConfigError(f"the shapes of a profile differ in rank: {self.smallest} {self.usual} {self.largest}")
        for sizes in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise ConfigError(f"a profile's sizes must grow from smallest to largest, got {sizes}")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        flavour: "tensorrt-rtx" builds ahead of time; "tensorrt" builds for the GPU of this machine.
        compute_capabilities: GPUs of a TensorRT-RTX engine, such as 89; none for TensorRT. With 75 in the list no
            convolution runs in int8 on any of them.
        batch: Smallest, usual and largest batch, for every input that ``profile`` does not name.
        profile: Shapes by input name; needed where more than the batch may vary.
        workspace_bytes: Limit of the scratch memory; the engine's own choice if None.
        timing_cache: File of kernel timings, read and written; TensorRT only.
    """

    flavour: str = "tensorrt-rtx"
    compute_capabilities: tuple[int, ...] = (80, 89, 120)
    batch: tuple[int, int, int] = (1, 2, 8)
    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    workspace_bytes: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise ConfigError(f"flavour {self.flavour!r} is unknown; use one of {', '.join(FLAVOURS)}")
        ahead = self.flavour == "tensorrt-rtx"
        if ahead and not self.compute_capabilities:
            raise ConfigError("TensorRT-RTX needs at least one compute capability, such as 89")
        if not ahead and self.compute_capabilities:
            raise ConfigError("TensorRT builds for the GPU it runs on; give compute_capabilities=()")
        if ahead and self.timing_cache is not None:
            raise ConfigError("TensorRT-RTX keeps no timing cache; leave timing_cache out")
        ShapeRange(*((size,) for size in self.batch))


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """A built engine.

    Attributes:
        version: Of the library that built it.
        layers: As its detailed build log lists them, in order of execution.
        seconds: Wall clock, process start included.
        messages: Warnings and errors of the build.
    """

    path: Path
    version: str
    layers: tuple[EngineLayer, ...]
    seconds: float
    messages: tuple[str, ...]


def engine_name(stem: str, version: str, options: BuildOptions) -> str:
    """A file name that tells engines apart that cannot stand in for each other.

    ``unet.tensorrt-rtx-1.7.1.116.sm80-89-120.batch1-2-8.engine``; an input with a profile of its own adds
    ``.text-1x77-2x77-8x77``.
    """
    gpus = [f"sm{'-'.join(map(str, options.compute_capabilities))}"] if options.compute_capabilities else []
    ranges = [
        f"{name}-{'-'.join('x'.join(map(str, shape)) for shape in (each.smallest, each.usual, each.largest))}"
        for name, each in sorted(options.profile.items())
    ]
    batch = f"batch{'-'.join(map(str, options.batch))}"
    return ".".join([stem, f"{options.flavour}-{version}", *gpus, batch, *ranges, "engine"])


def build_engine(onnx_path: Path, engine_path: Path, options: BuildOptions | None = None) -> EngineBuild:
    """Build one engine; the file appears under its name only when it is whole.

    Raises:
        LoadError: there is no such graph.
        ConfigError: the options do not fit the graph or the library.
        DependencyError: the library is not installed.
        BuildError: the parser or the builder refuses the graph, or crashes on it; with their own messages.
    """
    options = BuildOptions() if options is None else options
    if not onnx_path.is_file():
        raise LoadError(f"{onnx_path}: no such file; compile the model first")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=engine_path.parent, prefix=".engine-") as folder:
        job = _job(onnx_path, Path(folder), options)
        code = _run(job, Path(folder))
        log = _read_log(Path(job.log))
        version = _raise_unless_built(job, code, log)
        os.replace(job.engine, engine_path)
    return EngineBuild(
        path=engine_path,
        version=version,
        layers=parse_layers(text for _, text in log),
        seconds=time.perf_counter() - started,
        messages=tuple(text for severity, text in log if severity in _WORTH_TELLING),
    )


def _job(onnx_path: Path, folder: Path, options: BuildOptions) -> BuildJob:
    cache = options.timing_cache
    return BuildJob(
        flavour=options.flavour,
        # The parser looks for external weights beside the graph, so it must see the graph's own place.
        onnx=str(onnx_path.resolve()),
        engine=str(folder / "engine"),
        log=str(folder / "log.jsonl"),
        result=str(folder / "result.json"),
        compute_capabilities=options.compute_capabilities,
        profile={name: (each.smallest, each.usual, each.largest) for name, each in options.profile.items()},
        batch=options.batch,
        workspace_bytes=options.workspace_bytes,
        timing_cache=None if cache is None else str(cache.resolve()),
    )


def _run(job: BuildJob, folder: Path) -> int:
    """Exit code of the child; negative where a signal ended it."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), "utf-8")
    # -P: the modules beside trt_child.py must not shadow what TensorRT imports.
    done = subprocess.run([sys.executable, "-P", str(_CHILD), str(path)], capture_output=True, text=True, check=False)
    if done.returncode > 0:
        raise BuildError(f"{job.onnx}: the process that builds failed: {_one_line([done.stderr[-2000:]])}")
    return done.returncode


def _read_log(path: Path) -> list[tuple[str, str]]:
    """Severity and text of each message; the last line may be cut where the builder crashed."""
    if not path.exists():
        return []
    log = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        log.append((str(entry["severity"]), str(entry["text"])))
    return log


def _raise_unless_built(job: BuildJob, code: int, log: Sequence[tuple[str, str]]) -> str:
    """Version of the library that built the engine; the error that fits where it did not."""
    library = FLAVOURS[job.flavour]
    errors = [text for severity, text in log if severity in {"INTERNAL_ERROR", "ERROR"} and "cudaError" not in text]
    if code < 0:
        last = errors or [text for _, text in log[-1:]]
        raise BuildError(
            f"{job.onnx}: the builder of {library} crashed ({signal.Signals(-code).name}); the last it said: "
            f"{_one_line(last)}; {_rules_broken(Path(job.onnx), job.profile.keys())}"
        )
    result = json.loads(Path(job.result).read_text("utf-8"))
    kind, lines = result["error"], result["lines"]
    if kind == "import":
        raise DependencyError(f"{library} is not installed ({lines[0]}); pip install 'tfmq-export[{job.flavour}]'")
    if kind == "option":
        raise ConfigError(f"{job.onnx}: {library} {result['version']}: {_one_line(lines)}")
    if kind:
        what = "parser" if kind == "parse" else "builder"
        raise BuildError(
            f"{job.onnx}: the {what} of {library} {result['version']} refuses this graph: {_one_line(lines or errors)}"
        )
    return str(result["version"])


def _rules_broken(onnx_path: Path, profiled: Collection[str]) -> str:
    """What the lint holds against a graph that the builder crashed on: the log does not say why."""
    try:
        from tfmq_export.runtime.lint_tensorrt import lint_file
    except ImportError:
        return "install onnx for a lint of the rules it breaks"
    findings = lint_file(onnx_path, profiled=profiled)
    return _one_line([str(finding) for finding in findings]) if findings else "the lint finds no rule it breaks"


def _one_line(messages: Sequence[str]) -> str:
    """The first few messages on one line, less what is said of the GPU that need not be there."""
    told = [[line for line in message.splitlines() if "cudaError" not in line] for message in messages[:3]]
    shown = [" ".join(" ".join(lines).split()) for lines in told]
    return "; ".join(shown) or "it gave no reason"
