"""What a bundle is compared with: its own float twin, and what users would run instead of it."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tfmq_export.bench.job import Job
from tfmq_export.bench.workshop import Workshop
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.told_apart import folders_apart
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime.engines.table import ENGINES, engine_named
from tfmq_export.target import find_target

TWIN = "twin"
"""Each bundle's own graph without Q/DQ, on the same engine."""
OPENVINO_BF16 = "openvino-bf16"
"""A backend of bundles beside those of ``runtime.load``: OpenVINO with bf16 where nothing is quantized."""

Make = Callable[[Workshop, int], Job]
"""``make(workshop, threads)``: builds what the candidate needs, once per workshop."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to time.

    Attributes:
        make: Gets its job.
        graph: Hash of its graph, of a bundle; empty for a baseline.
    """

    name: str
    make: Make
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Another way to run the same float model.

    Attributes:
        packages: Beside what this package needs itself.
        job: What to run, where they are installed.
    """

    packages: tuple[str, ...]
    job: Make

    def make(self, workshop: Workshop, threads: int) -> Job:
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise DependencyError(f"{package} is not installed; pip install {package}")
        return self.job(workshop, threads)


def _float(workshop: Workshop, threads: int, *, backend: str, precision: str = "f32") -> Job:
    return workshop.graph_job(workshop.float_graph, threads, backend, precision)


def _quantize_static(workshop: Workshop, threads: int) -> Job:
    from tfmq_export.bench.peers import quantize_static  # which needs torch: the graph does, too

    path = workshop.folder / "quantize_static" / "model.onnx"
    if not path.exists():
        quantize_static(workshop.float_graph, path, workshop.rows)
    return workshop.graph_job(path, threads, "onnxruntime")


def _nncf(workshop: Workshop, threads: int, *, transformer: bool, precision: str = "f32") -> Job:
    from tfmq_export.bench.peers import nncf_quantize

    path = workshop.folder / ("nncf-transformer" if transformer else "nncf") / "model.xml"
    if not path.exists():
        nncf_quantize(workshop.float_graph, path, workshop.rows, transformer=transformer)
    return workshop.graph_job(path, threads, "openvino", precision)


def _torch(workshop: Workshop, threads: int, *, kind: str) -> Job:
    return workshop.torch_job(kind, threads)


_OPENVINO, _NNCF = ("openvino",), ("openvino", "nncf")
BASELINES: Mapping[str, Baseline] = {
    "ort-fp32": Baseline((), partial(_float, backend="onnxruntime")),
    "quantize-static": Baseline((), _quantize_static),
    "openvino-fp32": Baseline(_OPENVINO, partial(_float, backend="openvino")),
    "openvino-bf16": Baseline(_OPENVINO, partial(_float, backend="openvino", precision="bf16")),
    "nncf": Baseline(_NNCF, partial(_nncf, transformer=False)),
    "nncf-bf16": Baseline(_NNCF, partial(_nncf, transformer=False, precision="bf16")),
    "nncf-transformer": Baseline(_NNCF, partial(_nncf, transformer=True)),
    "nncf-transformer-bf16": Baseline(_NNCF, partial(_nncf, transformer=True, precision="bf16")),
    "torch": Baseline((), partial(_torch, kind="torch")),
    "torch-compile": Baseline((), partial(_torch, kind="torch-compile")),
}
"""By name; docs/benchmarks.md says what each is."""

NAMES = (TWIN, *BASELINES)
DEFAULT = (TWIN, "ort-fp32", "openvino-fp32", "torch")
"""Without --against there is no model to run, and the twin is left."""


def baselines_named(words: str | None, *, model: bool) -> tuple[str, ...]:
    """Read ``--baselines``.

    Args:
        words: Names with commas between, "all" or "none"; None takes the default.
        model: Whether the float model is there.
    Raises:
        ConfigError: an unknown name.
    """
    if words is None:
        return DEFAULT if model else (TWIN,)
    if words == "all":
        return NAMES
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip() not in ("", "none")))
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--baselines {name}: unknown; use {', '.join(NAMES)}, all or none")
    return names


def candidates_of(bundles: Sequence[Bundle], backends: Sequence[str], baselines: Sequence[str]) -> list[Candidate]:
    """Baselines first, in the order given, then every bundle on every backend.

    Raises:
        ConfigError: there is no such backend.
    """
    for backend in backends:
        if backend not in ("auto", OPENVINO_BF16):
            engine_named(backend)
    found = [Candidate(name, BASELINES[name].make) for name in baselines if name != TWIN]
    names = _names(bundles)
    for bundle, name in zip(bundles, names, strict=True):
        if TWIN in baselines:
            found.append(Candidate(f"{TWIN} of {name}", partial(_twin, bundle=bundle)))
        for backend in backends:
            title = name if backend == "auto" else f"{name} on {backend}"
            found.append(Candidate(title, partial(_bundle, bundle=bundle, backend=backend), bundle.graph_hash))
    return found


def _bundle(workshop: Workshop, threads: int, *, bundle: Bundle, backend: str) -> Job:
    if backend == OPENVINO_BF16:
        return workshop.job("bundle", bundle.root, threads, backend="openvino", precision="bf16")
    return workshop.job("bundle", bundle.root, threads, backend=_backend_of(bundle, backend))


def _twin(workshop: Workshop, threads: int, *, bundle: Bundle) -> Job:
    if _gpu_backends(bundle):
        raise ConfigError(f"it has none, because {bundle.manifest.target} runs engines or a GPU, not the graph alone")
    return workshop.job("bundle", workshop.float_twin(bundle), threads)


def _backend_of(bundle: Bundle, backend: str) -> str:
    """The backend by name, where "auto" might fall back to a CPU and time something else than the bundle is for.

    One that is asked for by name and runs the graph itself is taken at its word.
    """
    target, known = bundle.manifest.target, _gpu_backends(bundle)
    if not known:
        return backend
    built = {engine.flavour for engine in bundle.manifest.engines}
    runnable = [name for name in known if not engine_named(name).built or name in built]
    if backend == "auto" and runnable:
        return runnable[0]
    if backend in runnable or (backend != "auto" and not engine_named(backend).built):
        return backend
    raise ConfigError(
        f"{bundle.root}: compiled for {target}, to run on a GPU, through {' or '.join(known)}"
        + ("" if runnable else f"; build an engine with tfmq-build {bundle.root}")
    )


def _gpu_backends(bundle: Bundle) -> tuple[str, ...]:
    """What runs a bundle on a GPU, the first choice first; nothing for CPU targets."""
    target = find_target(bundle.manifest.target)
    engine = ENGINES[target.engine]
    if engine.built:
        return tuple(sorted(engine.versions, key=lambda flavour: flavour != target.name))
    return () if target.integers else ("onnxruntime-cuda",)


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Preset and target; with the folder where two bundles share them."""
    short = [f"{bundle.manifest.preset} {bundle.manifest.target}" for bundle in bundles]
    folders = folders_apart([bundle.root for bundle in bundles])
    return [
        f"{name} ({folder})" if short.count(name) > 1 else name for name, folder in zip(short, folders, strict=True)
    ]
