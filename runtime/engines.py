"""Which engine runs a bundle."""

import importlib.util
import logging
from pathlib import Path

from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime import openvino_runner, ort_runner
from tfmq_export.runtime.openvino_runner import OpenVinoRunner
from tfmq_export.runtime.ort_runner import OrtRunner
from tfmq_export.runtime.runner import Runner
from tfmq_export.target import Target, find_target

BACKENDS = ("auto", "onnxruntime", "openvino")

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


def open_runner(
    graph: Path, target: str, backend: str = "auto", *, threads: int | None = None, integer: bool = True
) -> Runner:
    """Open one graph of a bundle.

    Args:
        target: Name of the target the graph was compiled for.
        backend: "onnxruntime", "openvino", or "auto": the engine the graph was compiled for where it is installed,
            else ONNX Runtime, which computes the same numbers, if not in integers. Reference numerics are always
            ONNX Runtime's under "auto".
        threads: Of one inference; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
    Raises:
        ConfigError: no such backend, or one that does not compute this target's graphs rightly.
        DependencyError: a backend asked for by name is not installed, or ONNX Runtime where nothing else is.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "onnxruntime"
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
        return OpenVinoRunner(graph, threads=threads, integer=integer)
    # A TensorRT graph's integers are the GPU's; here it gives its reference numerics.
    return OrtRunner(graph, threads=threads, integer=integer and find_target(target).engine != "tensorrt")


def engine_version(target: str) -> str:
    """Name and version of the engine that ``open_runner`` takes for a target."""
    if find_target(target).engine == "openvino" and openvino_runner.is_installed():
        return f"openvino {openvino_runner.version()}"
    return f"onnxruntime {ort_runner.version()}"
