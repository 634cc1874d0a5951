"""Build a TensorRT or TensorRT-RTX engine in a process of its own.

TensorRT-RTX builds ahead of time for a list of GPUs on a machine that has none; TensorRT builds for the GPU it finds.
The builder may crash on a graph it does not support, and a crash must not take the compiler with it: so ``child.py``
does the work, and here is what starts it, reads its log and turns what went wrong into one error.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.engines.tensorrt.building.child import BuildJob
from tfmq_export.runtime.engines.tensorrt.building.layers import EngineLayer, parse_layers
from tfmq_export.runtime.engines.tensorrt.building.profile import Profile
from tfmq_export.runtime.engines.tensorrt.cuda_driver import gpu_capability
from tfmq_export.runtime.engines.tensorrt.library import FLAVOURS
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange

_CHILD = Path(__file__).with_name("child.py")
_WORTH_TELLING = frozenset({"INTERNAL_ERROR", "ERROR", "WARNING"})


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        flavour: "tensorrt-rtx" builds ahead of time; "tensorrt" builds for the GPU of this machine.
        compute_capabilities: GPUs of a TensorRT-RTX engine, such as 89; none for TensorRT. With 75 in the list no
            convolution runs in int8 on any of them.
        profiles: The shapes it is built for, one set of kernels each.
        workspace_bytes: Limit of the scratch memory; the engine's own choice if None.
        timing_cache: File of kernel timings, read and written; TensorRT only.
    """

    flavour: str = "tensorrt-rtx"
    compute_capabilities: tuple[int, ...] = (80, 89, 120)
    profiles: tuple[Profile, ...] = (Profile(),)
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
        if not self.profiles:
            raise ConfigError("an engine needs at least one profile, such as Profile(batch=(1, 2, 8))")


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """A built engine.

    Attributes:
        version: Of the library that built it.
        compute_capabilities: GPUs it runs on.
        shapes: Smallest, usual and largest shape of each input that may vary, once per profile.
        layers: As its detailed build log lists them, in order of execution.
        seconds: Wall clock, process start included.
        messages: Warnings and errors of the build.
    """

    path: Path
    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    shapes: tuple[Mapping[str, ShapeRange], ...]
    layers: tuple[EngineLayer, ...]
    seconds: float
    messages: tuple[str, ...]


def engine_name(stem: str, build: EngineBuild, profiles: Sequence[Profile]) -> str:
    """A file name that tells engines apart that cannot stand in for each other.

    ``unet.tensorrt-rtx-1.7.1.116.sm80-89-120.batch1-2-8.engine``; each further profile adds ``+4-8-16``, and shapes
    beside the batch their digest.
    """
    gpus = f"sm{'-'.join(map(str, build.compute_capabilities))}"
    batches = "+".join("-".join(map(str, profile.batch)) for profile in profiles)
    shapes = [sorted((name, asdict(each)) for name, each in profile.shapes.items()) for profile in profiles]
    digest = [f"shapes-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"] if any(shapes) else []
    return ".".join([stem, f"{build.flavour}-{build.version}", gpus, f"batch{batches}", *digest, "engine"])


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
        result = _raise_unless_built(job, code, log)
        os.replace(job.engine, engine_path)
    return EngineBuild(
        path=engine_path,
        flavour=options.flavour,
        version=result["version"],
        # What TensorRT built just now it built for the GPU of this machine.
        compute_capabilities=options.compute_capabilities or (gpu_capability(),),
        shapes=tuple(
            {name: ShapeRange(*map(tuple, shapes)) for name, shapes in profile.items()}
            for profile in result["profiles"]
        ),
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
        profiles=tuple(
            {
                "batch": profile.batch,
                "shapes": {name: (x.smallest, x.usual, x.largest) for name, x in profile.shapes.items()},
            }
            for profile in options.profiles
        ),
        workspace_bytes=options.workspace_bytes,
        timing_cache=None if cache is None else str(cache.resolve()),
    )


def _run(job: BuildJob, folder: Path) -> int:
    """Exit code of the child; negative where a signal ended it."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), "utf-8")
    # -P: the modules beside child.py must not shadow what TensorRT imports.
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


def _raise_unless_built(job: BuildJob, code: int, log: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What the child says of the engine; the error that fits where there is none."""
    library = FLAVOURS[job.flavour]
    errors = [text for severity, text in log if severity in {"INTERNAL_ERROR", "ERROR"} and "cudaError" not in text]
    if code < 0:
        last = errors or [text for _, text in log[-1:]]
        profiled = {name for profile in job.profiles for name in profile["shapes"]}
        raise BuildError(
            f"{job.onnx}: the builder of {library} crashed ({signal.Signals(-code).name}); the last it said: "
            f"{_one_line(last)}; {_rules_broken(Path(job.onnx), profiled)}"
        )
    result: dict[str, Any] = json.loads(Path(job.result).read_text("utf-8"))
    kind, lines = result["error"], result["lines"]
    if kind == "import":
        raise DependencyError(lines[0])
    if kind == "option":
        raise ConfigError(f"{job.onnx}: {library} {result['version']}: {_one_line(lines)}")
    if kind:
        what = "parser" if kind == "parse" else "builder"
        raise BuildError(
            f"{job.onnx}: the {what} of {library} {result['version']} refuses this graph: {_one_line(lines or errors)}"
        )
    return result


def _rules_broken(onnx_path: Path, profiled: Collection[str]) -> str:
    """What the lint holds against a graph that the builder crashed on: the log does not say why."""
    try:
        from tfmq_export.runtime.engines.tensorrt.building.lint import lint_file
    except ImportError:
        return "install onnx for a lint of the rules it breaks"
    findings = lint_file(onnx_path, profiled=profiled)
    return _one_line([str(finding) for finding in findings]) if findings else "the lint finds no rule it breaks"


def _one_line(messages: Sequence[str]) -> str:
    """The first few messages on one line, less what is said of the GPU that need not be there."""
    told = [[line for line in message.splitlines() if "cudaError" not in line] for message in messages[:3]]
    shown = [" ".join(" ".join(lines).split()) for lines in told]
    return "; ".join(shown) or "it gave no reason"
