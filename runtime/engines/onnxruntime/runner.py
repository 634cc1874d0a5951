"""ONNX Runtime; the only file that imports it."""

import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.runner import GraphRequest, one_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

BACKENDS = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
"""Provider by the name that it is asked for by."""

MISSING = "onnxruntime is not installed; pip install onnxruntime"

UNFOLDED = ("ConstantFolding",)
"""Left out where integers are computed in floating point: it would keep every weight dequantized, at four times the
size. Dequantizing them again in each call gives the same numbers."""

IDLE_BUFFERS = 8
"""Sets of device buffers that wait for their next use."""

# Whatever matters is raised as an exception; ORT would print the same text to stderr a second time.
_FATAL_ONLY = 4


class OrtRunner:
    """One ONNX Runtime session with every graph optimization on.

    Args:
        threads: Intra-op threads; None leaves the choice to ONNX Runtime.
        integer: False computes QDQ graphs in floating point, node by node: the reference numerics.
        optimized_to: Where to write the graph as ONNX Runtime runs it; weights go to ``weights.bin`` beside it.
        provider: "cpu" or "cuda".
        weights_in: Folder of the weights that lie outside the graph, where it is not the graph's own.
    Raises:
        LoadError: there is no such file.
        BuildError: ONNX Runtime refuses the graph, or cannot start the provider.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        threads: int | None = None,
        integer: bool = True,
        optimized_to: Path | None = None,
        provider: str = "cpu",
        weights_in: Path | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise ConfigError(f"provider {provider!r} is unknown; use one of {', '.join(PROVIDERS)}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        if not model_path.is_file():
            raise LoadError(f"{model_path}: no such file; compile the model first")
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        if not integer:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.enable_cpu_mem_arena = False  # it would keep dequantized weights, and every value that is returned
        if optimized_to is not None:
            options.optimized_model_filepath = str(optimized_to)
            # Protobuf ends at 2 GB, and a reader of the graph has no use for the weights.
            entry = "session.optimized_model_external_initializers_"
            options.add_session_config_entry(f"{entry}file_name", "weights.bin")
            options.add_session_config_entry(f"{entry}min_size_in_bytes", "1024")
        # ONNX Runtime looks for weights elsewhere only where it is given the graph itself and not its path.
        source = str(model_path) if weights_in is None else model_path.read_bytes()
        if weights_in is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_in))
        self._path = model_path
        self._errors = engine_errors()
        wanted = PROVIDERS[provider]
        names = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
        if wanted not in ort.get_available_providers():
            raise DependencyError(
                f"this onnxruntime has no {wanted}; pip install 'onnxruntime-gpu[cuda,cudnn]', or use the cpu provider"
            )
        try:
            # ORT's own fallback would change the engine behind the caller's back.
            session = ort.InferenceSession(
                source, options, providers=names, enable_fallback=0, disabled_optimizers=None if integer else UNFOLDED
            )
        except self._errors as error:
            raise BuildError(
                f"{model_path}: ONNX Runtime refuses this graph: {one_line(error)}; a newer onnxruntime than "
                f"{version()} may take it, or a bundle for another --target"
            ) from error
        if wanted not in session.get_providers():
            raise BuildError(
                f"{model_path}: ONNX Runtime could not start {wanted}; check the GPU driver or use the cpu"
            )
        self._session: Any = session
        self._run_options: Any = ort.RunOptions()
        self._run_options.log_severity_level = _FATAL_ONLY
        self.inputs: tuple[str, ...] = tuple(item.name for item in session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(item.name for item in session.get_outputs())
        self._buffers = DeviceBuffers(session, self._run_options, provider) if provider != "cpu" else None
        self.engine = f"onnxruntime {ort.__version__}"
        if provider == "cuda":
            self.engine += " on CUDA, which has no int8 kernels for QDQ graphs: they compute in floating point"

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the graph once.

        Raises:
            BuildError: with ONNX Runtime's message; the runner stays usable.
        """
        if self._session is None:
            raise ConfigError(f"{self._path}: the runner is closed; open it again")
        try:
            if self._buffers is not None:
                return self._buffers.infer(feeds)
            values = self._session.run(list(self.outputs), dict(feeds), self._run_options)
        except self._errors as error:
            raise BuildError(
                f"{self._path}: ONNX Runtime failed: {one_line(error)}; check the inputs {', '.join(self.inputs)}"
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    def settings(self) -> dict[str, str]:
        """What the session runs on."""
        if self._session is None:
            raise ConfigError(f"{self._path}: the runner is closed; open it again")
        threads = self._session.get_session_options().intra_op_num_threads
        return {
            "engine": f"onnxruntime {version()}",
            "provider": self._session.get_providers()[0],
            "threads": str(threads) if threads else "its own choice",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session, self._buffers = None, None


class DeviceBuffers:
    """Runs a session on buffers that stay on its device, one set for each set of shapes and each thread.

    Inputs are copied into place and outputs out of it, with no allocation in between.

    Args:
        device: As ONNX Runtime calls it, such as "cuda".
    """

    def __init__(self, session: Any, run_options: Any, device: str) -> None:
        self._session = session
        self._run_options = run_options
        self._device = device
        self._outputs = [item.name for item in session.get_outputs()]
        self._idle: deque[tuple[object, Any, dict[str, Any]]] = deque(maxlen=IDLE_BUFFERS)
        self._lock = threading.Lock()

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        shapes = sorted((name, array.shape, array.dtype.str) for name, array in arrays.items())
        with self._lock:
            found = next((each for each in self._idle if each[0] == shapes), None)
            if found is not None:
                self._idle.remove(found)
        _, binding, inputs = found or self._new(arrays, shapes)
        for name, array in arrays.items():
            inputs[name].update_inplace(array)
        self._session.run_with_iobinding(binding, self._run_options)
        # On a CPU ``numpy`` looks into the buffer, which the next run fills.
        values = [value.numpy().copy() for value in binding.get_outputs()]
        with self._lock:
            self._idle.append((shapes, binding, inputs))
        return dict(zip(self._outputs, values, strict=True))

    def _new(self, arrays: Mapping[str, NDArray[np.generic]], shapes: object) -> tuple[object, Any, dict[str, Any]]:
        binding = self._session.io_binding()
        new = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
        inputs = {name: new(array.shape, array.dtype, self._device, 0) for name, array in arrays.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        return shapes, binding, inputs


def open_graph(request: GraphRequest) -> OrtRunner:
    """Open a graph on the provider asked for."""
    provider = BACKENDS[request.backend]
    return OrtRunner(request.graph, threads=request.threads, integer=request.integer, provider=provider)


def version() -> str:
    """Version of the installed ONNX Runtime."""
    return str(import_onnxruntime().__version__)


def import_onnxruntime() -> ModuleType:
    """The library's module.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(MISSING) from error
    module: ModuleType = onnxruntime
    return module


def engine_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: classes of its own that share no base, and Python's for a missing feed."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = tuple(item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*own, RuntimeError, ValueError)
