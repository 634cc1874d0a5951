"""One NVIDIA GPU, through the driver's own library.

The driver API is all that running an engine takes: memory, copies, streams, graphs. It comes with every driver, so a
host that runs engines installs nothing for it; the device's primary context is the one that TensorRT, torch and CuPy
use, so addresses and streams mean the same to all of them.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import BuildError, DependencyError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

PROTOTYPES: Mapping[str, tuple[Any, ...]] = {
    # Types of cuda.h: a handle or a pointer is c_void_p, CUdeviceptr is c_uint64.
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile

Call = Callable[..., None]


class CudaDevice:
    """A GPU and its primary context.

    Args:
        ordinal: Which GPU.
        library: File of the driver's library; the system's if None.
    Raises:
        DependencyError: there is no driver, or no such GPU.
    """

    def __init__(self, ordinal: int = 0, *, library: str | None = None) -> None:
        self._call = _driver(library or LIBRARY)
        count = c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= ordinal < count.value:
            raise DependencyError(f"there is no GPU {ordinal}; the driver sees {count.value}")
        device = c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        self._context: int | None = self._handle("cuDevicePrimaryCtxRetain", self._device)

    @property
    def name(self) -> str:
        """Such as "NVIDIA L4"."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode("utf-8", errors="replace")

    @property
    def capability(self) -> int:
        """Compute capability, such as 89 for 8.9."""
        parts = []
        for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
            value = c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            parts.append(value.value)
        return 10 * parts[0] + parts[1]

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this thread's calls, TensorRT's among them, go to this GPU; what was current before comes back."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes, aligned to 256."""
        return self._handle("cuMemAlloc_v2", max(size, 1), kind=c_uint64)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def upload(self, array: NDArray[np.generic], address: int, stream: int) -> None:
        """Copy a contiguous array to the device; the array may be changed as soon as this returns."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def download(self, address: int, array: NDArray[np.generic], stream: int) -> None:
        """Copy into a contiguous array; it holds the values once the stream is synchronized."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cuStreamCreate", NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """A graph of what ``work`` enqueues on a stream; nothing runs yet."""
        self._call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
        graph = c_void_p()
        try:
            work()
        except BaseException:
            # The stream stays unusable while it captures; the error of the work is the one to tell.
            with contextlib.suppress(BuildError):
                self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
            raise
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        executable = self._handle("cuGraphInstantiateWithFlags", graph, 0)
        self._call("cuGraphDestroy", graph)
        return executable

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Let the context go; others in this process may still hold it."""
        if self._context is not None:
            self._context = None
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _handle(self, name: str, *arguments: object, kind: Any = c_void_p) -> int:
        """What a function writes through its first parameter."""
        made = kind()
        self._call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)


def gpu_capability(ordinal: int = 0) -> int:
    """Compute capability of a GPU, such as 89.

    Raises:
        DependencyError: there is no driver, or no such GPU.
    """
    device = CudaDevice(ordinal)
    try:
        return device.capability
    finally:
        device.close()


def has_gpu(*, library: str | None = None) -> bool:
    """Whether there is a driver and a GPU that works: a broken one cannot build or run anything."""
    try:
        CudaDevice(library=library).close()
    except (DependencyError, BuildError):
        return False
    return True


def _driver(library: str) -> Call:
    """The driver's functions by name; what they return becomes an error unless it is success."""
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise DependencyError(
            f"no NVIDIA driver here ({library} cannot be loaded); engines run on a machine with a GPU"
        ) from error
    for name, types in PROTOTYPES.items():
        getattr(loaded, name).argtypes = types

    def call(name: str, *arguments: object) -> None:
        code = getattr(loaded, name)(*arguments)
        if code:
            raise BuildError(f"the NVIDIA driver refuses {name}: {_words(loaded, code)}")

    code = loaded.cuInit(0)
    if code:
        raise DependencyError(f"the NVIDIA driver finds no GPU: {_words(loaded, code)}")
    return call


def _words(loaded: ctypes.CDLL, code: int) -> str:
    name, text = c_char_p(), c_char_p()
    loaded.cuGetErrorName(code, ctypes.byref(name))
    loaded.cuGetErrorString(code, ctypes.byref(text))
    return " ".join(each.decode() for each in (name.value, text.value) if each) or f"error {code}"
