"""A graph on Qualcomm's Hexagon NPU; where there is none, in its emulator on this CPU."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import BuildError, ConfigError, LoadError
from tfmq_export.runtime.engines.onnxruntime.runner import engine_errors
from tfmq_export.runtime.engines.qnn.library import library, version
from tfmq_export.runtime.engines.qnn.session import SessionRequest, interface_of, open_session, sizes_of
from tfmq_export.runtime.runner import GraphRequest, one_line


class QnnRunner:
    """One graph; each set of input shapes is compiled for when it first comes, since the NPU takes no open sizes.

    No node runs on the CPU: a graph that is not the NPU's alone is refused.

    Raises:
        LoadError: there is no such file.
        DependencyError: onnxruntime-qnn is not installed.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise LoadError(f"{path}: no such file; compile the model first")
        self._library = library()
        self._path = path
        self._inputs, self.outputs = interface_of(self._library, path)
        self.inputs: tuple[str, ...] = tuple(self._inputs)
        self.engine = f"onnxruntime-qnn {version()}, {'HTP emulator' if self._library.emulated else 'HTP'}"
        self._sessions: dict[tuple[tuple[str, int], ...], Any] | None = {}
        self._compiling = threading.Lock()

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the graph once.

        Raises:
            BuildError: a wrong input, or the provider's own message; the runner stays usable.
        """
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        if wrong := self._wrong_with(arrays):
            raise BuildError(f"{self._path}: {wrong}; check the inputs {', '.join(self.inputs)}")
        session = self._session_for({name: value.shape for name, value in arrays.items()})
        try:
            values = session.run(list(self.outputs), arrays)
        except engine_errors() as error:
            raise BuildError(f"{self._path}: onnxruntime-qnn failed: {one_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def settings(self) -> dict[str, str]:
        """What the graph runs on."""
        return {"engine": f"onnxruntime-qnn {version()}", "device": "emulator" if self._library.emulated else "NPU"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sessions = None

    def _wrong_with(self, arrays: Mapping[str, NDArray[np.generic]]) -> str:
        if self._inputs.keys() != arrays.keys():
            return f"got the inputs {', '.join(sorted(arrays)) or 'none'}"
        for name, (declared, number) in self._inputs.items():
            array = arrays[name]
            fits = array.ndim == len(declared) and all(
                isinstance(size, str) or size == given for size, given in zip(declared, array.shape, strict=True)
            )
            if not fits:
                return f"{name} has shape {list(array.shape)}, needs {list(declared)}"
            if array.dtype != number:
                return f"{name} is {array.dtype}, needs {number}"
        return ""

    def _session_for(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        sizes = sizes_of({name: declared for name, (declared, _) in self._inputs.items()}, shapes)
        key = tuple(sorted(sizes.items()))
        with self._compiling:
            if self._sessions is None:
                raise ConfigError(f"{self._path}: the runner is closed; open it again")
            if key not in self._sessions:
                self._sessions[key] = open_session(self._library, self._path, SessionRequest(sizes))
            return self._sessions[key]


def open_graph(request: GraphRequest) -> QnnRunner:
    """Open a graph on the NPU, or in its emulator."""
    if not request.integer:
        raise ConfigError(
            "qnn computes in integers alone; reference numerics are ONNX Runtime's: backend='onnxruntime'"
        )
    return QnnRunner(request.graph)
