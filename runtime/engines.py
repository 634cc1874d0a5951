"""Which engine runs a bundle."""

import importlib.util
import logging
from pathlib import Path

from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime import openvino_runner
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
        ConfigError: no such backend.
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
    if backend == "openvino":
        return OpenVinoRunner(graph, threads=threads, integer=integer)
    return OrtRunner(graph, threads=threads, integer=integer)
