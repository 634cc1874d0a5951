"""Which engine runs a bundle."""

import importlib.util
import logging
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.engines.onnxruntime import runner as ort_runner
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.openvino import runner as openvino_runner
from tfmq_export.runtime.engines.openvino.runner import OpenVinoRunner
from tfmq_export.runtime.engines.tensorrt.choose import EngineHost, choose_engine
from tfmq_export.runtime.engines.tensorrt.cuda_driver import CudaDevice, has_gpu
from tfmq_export.runtime.engines.tensorrt.library import FLAVOURS, import_tensorrt
from tfmq_export.runtime.engines.tensorrt.runner import TrtRunner
from tfmq_export.runtime.runner import Runner
from tfmq_export.target import Target, find_target

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", "openvino", *FLAVOURS)

_log = logging.getLogger(__name__)


def require_engine(target: Target) -> None:
    """Raise DependencyError now if a target's engine is missing, not after an hour of quantizing."""
    if target.engine == "openvino":
        openvino_runner.version()
    if target.engine == "tensorrt" and importlib.util.find_spec("tensorrt_rtx") is None:
        raise DependencyError(
            f"{target.name}: TensorRT-RTX is not installed, whose engine proves without a GPU what runs in int8; "
            "pip install 'tfmq-export[tensorrt-rtx]'"
        )


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
        backend: As in ``open_runner``, and "tensorrt" or "tensorrt-rtx" for an engine. "auto" takes an engine where
            one runs here.
        precision: What OpenVINO computes in where nothing is quantized: "f32" if None.
    Raises:
        ConfigError: no such backend, or no engine that runs here.
        LoadError: the engine is missing or altered.
        DependencyError: what was asked for by name is not installed, or there is no GPU.
    """
    if backend in FLAVOURS:
        if not integer:
            raise ConfigError(f"{backend} has no reference numerics; use the onnxruntime backend")
        return open_engine(bundle, graph, backend)
    target = find_target(bundle.manifest.target)
    if backend == "auto" and integer and target.engine == "tensorrt":
        for flavour in dict.fromkeys(each.flavour for each in bundle.manifest.engines):
            try:
                return open_engine(bundle, graph, flavour)
            except (ConfigError, DependencyError, BuildError) as error:
                _log.warning("%s: on ONNX Runtime, in floating point: %s", graph, error)
    return open_runner(graph, target.name, backend, threads=threads, integer=integer, precision=precision)


def open_engine(bundle: Bundle, graph: Path, flavour: str) -> TrtRunner:
    """Open the engine built from one graph of a bundle that runs on this machine's first GPU.

    Raises:
        ConfigError: none was built for it.
        DependencyError: the library is not installed, or there is no GPU.
        LoadError: the engine is missing or altered.
        BuildError: the library refuses it.
    """
    name = graph.relative_to(bundle.root).as_posix()
    engines = [each for each in bundle.manifest.engines if each.graph == name]
    if not any(each.flavour == flavour for each in engines):
        raise ConfigError(f"{graph}: no engine for {FLAVOURS[flavour]} was built from it; build one with tfmq-build")
    version = str(import_tensorrt(flavour).__version__)
    device = CudaDevice()
    try:
        chosen = choose_engine(engines, EngineHost(flavour, version, device.capability))
        path = bundle.root / chosen.file
        # Comparing sizes costs nothing; a hash, which ``load(verify=True)`` compares, reads the whole file.
        if path.is_file() and path.stat().st_size != chosen.size:
            raise LoadError(f"{path}: {path.stat().st_size} bytes, the manifest says {chosen.size}; build it again")
        return TrtRunner(path, flavour=flavour, device=device)
    except BaseException:
        device.close()
        raise


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
        backend: "onnxruntime", "onnxruntime-cuda", "openvino", or "auto": the engine the graph was compiled for where
            it is installed, else ONNX Runtime, which computes the same numbers, if not in integers. Reference numerics
            are always ONNX Runtime's under "auto".
        threads: Of one inference; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
        precision: What OpenVINO computes in where nothing is quantized: "f32" if None.
    Raises:
        ConfigError: no such backend, or one that does not compute this target's graphs rightly.
        DependencyError: a backend asked for by name is not installed, or ONNX Runtime where nothing else is.
    """
    if backend not in BACKENDS or backend in FLAVOURS:
        raise ConfigError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "onnxruntime-cuda" if target == "ort-cuda" and has_gpu() else "onnxruntime"
        if integer and find_target(target).engine == "openvino":
            if openvino_runner.is_installed():
                backend = "openvino"
            else:
                _log.warning("%s was compiled for openvino, which is not installed; on ONNX Runtime", graph)
    if backend == "openvino" and find_target(target).engine != "openvino":
        # Seen with 2026.4: some of its quantized outputs come out as zeros there, without a word.
        raise ConfigError(
            f"{graph}: compiled for {target}; OpenVINO computes such a graph wrongly; compile it with --target openvino"
        )
    if backend == "openvino":
        return OpenVinoRunner(graph, threads=threads, integer=integer, precision=precision or "f32")
    if precision is not None:
        raise ConfigError(f"precision {precision!r} is OpenVINO's option; {backend} computes in the graph's own types")
    # A TensorRT graph's integers are the GPU's; here it gives its reference numerics.
    integer = integer and find_target(target).engine != "tensorrt"
    provider = "cuda" if backend == "onnxruntime-cuda" else "cpu"
    return OrtRunner(graph, threads=threads, integer=integer, provider=provider)


def engine_version(target: str) -> str:
    """Name and version of the engine that ``open_runner`` takes for a target."""
    if find_target(target).engine == "openvino" and openvino_runner.is_installed():
        return f"openvino {openvino_runner.version()}"
    return f"onnxruntime {ort_runner.version()}"
