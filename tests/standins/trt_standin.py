"""A stand-in for TensorRT and the GPU, for the logic around them on a machine that has neither.

The engine computes ``prediction = sample / 2 + timestep`` on addresses, as TensorRT does, with the signatures of
``tfmq_export.runtime.engines.tensorrt.api``; the driver is C, on host memory. What it cannot show: that TensorRT and a
GPU agree.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tfmq_export.runtime.engines.tensorrt.cuda_driver import CudaDevice

SOURCE = Path(__file__).with_name("cuda_standin.c")
HAS_COMPILER = shutil.which("cc") is not None
ENGINE = b"an engine"


class Driver:
    """The C library, compiled, and what it is told by tests."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "libcuda_standin.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", self.path, str(SOURCE)], check=True)
        self.library = ctypes.CDLL(self.path)
        self.library.standin_next_graph.restype = ctypes.c_ssize_t
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(self._launch)
        self.library.standin_on_launch(self._callback)

    def device(self) -> CudaDevice:
        return CudaDevice(library=self.path)

    @property
    def held(self) -> int:
        return self.library.standin_held()

    def enqueue(self, work: Callable[[], None]) -> None:
        """Run, or note down while a stream captures."""
        if self.library.standin_capturing():
            self.graphs.setdefault(self.library.standin_next_graph(), []).append(work)
        else:
            work()

    def _launch(self, graph: int) -> None:
        self.launches += 1
        for work in self.graphs[graph]:
            work()


class Context:
    """``IExecutionContext``."""

    def __init__(self, driver: Driver, batches: list[tuple[int, int, int]]) -> None:
        self.driver, self.batches = driver, batches
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0
        self.fails = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < len(self.batches)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.batches[self.profile]
        self.shapes[name] = shape
        return low <= shape[0] <= high

    def infer_shapes(self) -> list[str]:
        return sorted({"sample", "timestep"} - self.shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample" if name == "prediction" else name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.fails:
            return False
        self.runs += 1
        addresses, shapes = dict(self.addresses), dict(self.shapes)

        def work() -> None:
            x, t, y = (
                at(addresses[name], shapes[like], dtype)
                for name, like, dtype in (
                    ("sample", "sample", np.float32),
                    ("timestep", "timestep", np.int64),
                    ("prediction", "sample", np.float32),
                )
            )
            y[...] = x / 2 + t.reshape(-1, *[1] * (x.ndim - 1))

        self.driver.enqueue(work)
        return True


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array on an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Engine:
    """``ICudaEngine``."""

    names = ("sample", "timestep", "prediction")

    def __init__(self, driver: Driver, batches: list[tuple[int, int, int]]) -> None:
        self.driver, self.batches = driver, batches
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(batches)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == "prediction" else "input"

    def get_tensor_dtype(self, name: str) -> type:
        return np.int64 if name == "timestep" else np.float32

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if name == "timestep" else (-1, 3, 8, 8)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self.batches[profile_index]]

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy="disabled")

    def create_execution_context(self, runtime_config: object) -> Context:
        self.contexts.append(Context(self.driver, self.batches))
        return self.contexts[-1]


def library(driver: Driver, batches: list[tuple[int, int, int]], version: str = "11.4.0") -> SimpleNamespace:
    """The module; ``module.engines`` are those that were opened."""
    engines: list[Engine] = []

    class Runtime:
        def __init__(self, logger: object) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            if serialized_engine != ENGINE:
                self.logger.log(SimpleNamespace(name="ERROR"), "plan.header.size == blobSize failed.")
                return None
            engines.append(Engine(driver, batches))
            return engines[-1]

    class ILogger:
        pass

    return SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        nptype=lambda dtype: dtype,
        engines=engines,
    )
