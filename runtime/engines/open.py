"""Which engine runs a graph: the one asked for by name, else its target's, else ONNX Runtime."""

import logging
from dataclasses import replace
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import BuildError, ConfigError, DependencyError
from tfmq_export.runtime.engines.table import ENGINES, FALLBACK, engine_named
from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu
from tfmq_export.runtime.runner import GraphRequest, Runner
from tfmq_export.target import Target, find_target

_log = logging.getLogger(__name__)


def require_engine(target: Target) -> None:
    """Raise DependencyError now if a target's engine is missing, not after an hour of quantizing."""
    engine = ENGINES[target.engine]
    if not engine.installed():
        raise DependencyError(engine.missing.format(target=target.name))


def open_graph(
    bundle: Bundle,
    graph: Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    integer: bool = True,
    precision: str | None = None,
) -> Runner:
    """Open one graph of a bundle: an engine built from it, or the graph itself.

    Args:
        backend: As in ``open_runner``, or one that runs what was built from the graph, which "auto" takes where some
            of it runs here.
        precision: As in ``open_runner``.
    Raises:
        ConfigError: no such backend, or no engine that runs here.
        LoadError: the engine is missing or altered.
        DependencyError: what was asked for by name is not installed, or there is no GPU.
    """
    target, request = bundle.manifest.target, GraphRequest(graph, backend, threads, integer, precision, bundle)
    if backend != "auto" and engine_named(backend).built:
        return engine_named(backend).open_graph(request)
    own = ENGINES[find_target(target).engine]
    if backend == "auto" and integer and own.built:
        for flavour in dict.fromkeys(each.flavour for each in bundle.manifest.engines):
            try:
                return own.open_graph(replace(request, backend=flavour))
            except (ConfigError, DependencyError, BuildError) as error:
                _log.warning("%s: on ONNX Runtime, in floating point: %s", graph, error)
    return open_runner(graph, target, backend, threads=threads, integer=integer, precision=precision)


def open_runner(
    graph: Path,
    target: str,
    backend: str = "auto",
    *,
    threads: int | None = None,
    integer: bool = True,
    precision: str | None = None,
) -> Runner:
    """Open one ONNX graph.

    Args:
        target: Name of the target the graph was compiled for.
        backend: A name in ``ENGINES``, or "auto": the engine the graph was compiled for where it is installed, else
            ONNX Runtime, which computes the same numbers, if not in integers. Reference numerics are always ONNX
            Runtime's under "auto".
        threads: Of one inference; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
        precision: What computes where nothing is quantized, on an engine that leaves it open.
    Raises:
        ConfigError: no such backend, or one that does not compute this target's graphs rightly.
        DependencyError: a backend asked for by name is not installed, or ONNX Runtime where nothing else is.
    """
    made_for = find_target(target)
    backend = _usual_backend(graph, made_for, integer) if backend == "auto" else backend
    engine = engine_named(backend, built=False)
    if target not in engine.targets:
        raise ConfigError(
            f"{graph}: compiled for {target}; {engine.title} computes such a graph wrongly; "
            f"compile it with --target {' or '.join(engine.targets)}"
        )
    if precision is not None and not engine.precisions:
        takers = " and ".join(each.title for each in ENGINES.values() if each.precisions)
        raise ConfigError(f"precision {precision!r} is {takers}'s option; {backend} computes in the graph's own types")
    # The integers of such a graph are another device's; here it gives its reference numerics.
    own = ENGINES[made_for.engine]
    integer = integer and (engine is own or not (own.built or own.floats_elsewhere))
    return engine.open_graph(GraphRequest(graph, backend, threads, integer, precision))


def engine_version(target: str) -> str:
    """Name and version of the engine that ``open_runner`` takes for a target."""
    own = ENGINES[find_target(target).engine]
    engine = own if own.usual else ENGINES[FALLBACK]
    return f"{engine.name} {engine.versions[engine.name]()}"


def _usual_backend(graph: Path, target: Target, integer: bool) -> str:
    own = ENGINES[target.engine]
    if integer and not own.built and own.name != FALLBACK:
        if own.usual:
            return own.name
        if own.floats_elsewhere:
            return FALLBACK
        _log.warning("%s was compiled for %s, which is not installed; on ONNX Runtime", graph, own.name)
    return "onnxruntime-cuda" if target.name == "ort-cuda" and has_gpu() else FALLBACK
