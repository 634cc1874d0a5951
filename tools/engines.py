"""ONNX Runtime and OpenVINO on equal terms: the same threads, nothing left to a default that differs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tfmq_export.capture.program import BATCH

Feeds = Mapping[str, NDArray[np.generic]]
Call = Callable[[Feeds], NDArray[np.generic]]
"""One run of a graph: arrays by input name to the first output. The result is valid until the next run."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs a graph.

    Attributes:
        name: "onnxruntime" or "openvino".
        precision: What OpenVINO may compute in where the graph says float: "f32" or "bf16". Its own default
            depends on the machine, so it is always said.
    """

    name: str
    precision: str = "f32"

    def describe(self) -> str:
        """Engine, version and, where there is a choice, what it computes in where nothing is quantized."""
        if self.name == "onnxruntime":
            return f"onnxruntime {onnxruntime.__version__}"
        import openvino

        return f"openvino {openvino.__version__.partition('-')[0]}, rest {self.precision}"

    def open(self, path: Path, threads: int, example: Feeds) -> Call:
        """Load a graph on a number of threads, for inputs shaped like ``example``.

        Shapes are fixed on both engines: OpenVINO loses speed on a dynamic batch.
        """
        if self.name == "onnxruntime":
            return _onnxruntime(path, threads, example)
        return _openvino(path, threads, example, self.precision)


def _onnxruntime(path: Path, threads: int, example: Feeds) -> Call:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads would spin into the next candidate's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name(BATCH, max(len(value) for value in example.values() if value.ndim))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name
    return lambda feeds: session.run([output], dict(feeds))[0]


def _openvino(path: Path, threads: int, example: Feeds, precision: str) -> Call:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # ONNX Runtime does not pin either
    }
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({name: list(value.shape) for name, value in example.items()})
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    # Without copies, as in ONNX Runtime.
    return lambda feeds: request.infer(dict(feeds), share_inputs=True, share_outputs=True)[0]
