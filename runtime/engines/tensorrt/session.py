"""Running an engine: one execution context, one stream, and device buffers that are filled and read in place.

``infer`` copies arrays straight into the engine's inputs and straight out of its outputs. ``enqueue`` takes arrays that
are on the device already, and returns before the device has done anything: a sampler whose arithmetic runs on the
device too enqueues step after step and waits once, at the end.
"""

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.runtime.engines.tensorrt.api import IExecutionContext
from tfmq_export.runtime.engines.tensorrt.cuda_driver import CudaDevice
from tfmq_export.runtime.engines.tensorrt.device_array import DeviceArray, OnDevice, as_device_array
from tfmq_export.runtime.engines.tensorrt.tensors import EngineTensors, Shapes

_log = logging.getLogger(__name__)

Value = NDArray[np.generic] | OnDevice


class EngineSession:
    """One execution context with a stream and buffers of its own; for one thread at a time.

    A run that repeats the one before, with the same shapes and addresses, becomes a CUDA graph. It lasts until one of
    them changes: TensorRT forbids to touch a context that a graph was captured from.

    Args:
        capture: Whether to do that here. TensorRT-RTX does it itself.
        messages: TensorRT's own, the latest last.
    """

    def __init__(
        self,
        context: IExecutionContext,
        device: CudaDevice,
        tensors: EngineTensors,
        *,
        capture: bool,
        messages: Iterable[str] = (),
    ) -> None:
        self._context: IExecutionContext | None = context
        self._device = device
        self._tensors = tensors
        self._messages = messages
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # address and size, by tensor
        self._uploaded: list[int] = []
        self._capture = capture
        self._ran = False  # since shapes and addresses were last set
        self._graph: int | None = None
        with device.current():
            self.stream = device.create_stream()
        self._last = self.stream

    @property
    def shapes(self) -> Shapes:
        """Of the inputs of the last run."""
        return self._shapes

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once and wait.

        Raises:
            ConfigError: a missing or unknown input, a wrong type, or a shape the engine was not built for.
            BuildError: TensorRT or the driver failed, with their own words.
        """
        returned = self.enqueue(feeds)
        arrays: dict[str, NDArray[np.generic]] = {name: np.empty(x.shape, x.dtype) for name, x in returned.items()}
        with self._device.current():
            for name, array in arrays.items():
                self._device.download(returned[name].address, array, self.stream)
            self._device.synchronize(self.stream)
        return arrays

    def enqueue(self, feeds: Mapping[str, Value], stream: int | None = None) -> dict[str, DeviceArray]:
        """Put one run on a stream, behind what is there, and return at once.

        Args:
            feeds: Arrays on the device are read where they are; numpy arrays are copied there first, on the stream.
            stream: Handle of the CUDA stream that the arrays were made on, such as
                ``torch.cuda.current_stream().cuda_stream``; the session's own if None. It must outlive the session.
        Returns:
            Where the outputs will be. The next run overwrites them.
        """
        context = self._open()
        values = self._checked(feeds)
        if stream is None:
            for name, value in values.items():
                if isinstance(value, DeviceArray) and value.stream != self.stream:
                    raise ConfigError(f"{name}: made on another stream than the session's; give enqueue that stream")
        stream = self.stream if stream is None else stream
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        with self._device.current():
            self._set_shapes(context, shapes, stream)
            returned = {name: self._output(context, name, stream) for name in self._tensors.outputs}
            addresses = {name: each.address for name, each in returned.items()}
            for name, value in values.items():
                addresses[name] = value.address if isinstance(value, DeviceArray) else self._copied(name, value, stream)
            self._set_addresses(context, addresses)
            self._last = stream  # what was to wait for the run before has waited
            self._run(context, stream)
        return returned

    def upload(self, array: NDArray[np.generic]) -> DeviceArray:
        """Keep an array on the device until the session closes: a schedule's timesteps, a prompt."""
        self._open()
        array = np.ascontiguousarray(array)
        with self._device.current():
            address = self._device.allocate(array.nbytes)
            self._uploaded.append(address)
            self._device.upload(array, address, self.stream)
            self._device.synchronize(self.stream)  # any stream may read it from now on
        return DeviceArray(address, array.shape, array.dtype, self.stream)

    def download(self, array: OnDevice) -> NDArray[np.generic]:
        """Wait for an array and copy it to the host."""
        self._open()
        there = as_device_array("array", array)
        here: NDArray[np.generic] = np.empty(there.shape, there.dtype)
        with self._device.current():
            self._device.synchronize(there.stream)
            self._device.download(there.address, here, self.stream)
            self._device.synchronize(self.stream)
        return here

    def synchronize(self) -> None:
        """Wait for the last run."""
        self._open()
        with self._device.current():
            self._device.synchronize(self._last)

    def close(self) -> None:
        """Wait for what still runs and give the memory back."""
        if self._context is None:
            return
        with self._device.current():
            self._device.synchronize(self._last)
            self._drop_graph()
            self._context = None  # before the memory it points to
            for address in [*self._uploaded, *(address for address, _ in self._buffers.values())]:
                self._device.free(address)
            self._device.destroy_stream(self.stream)

    def _open(self) -> IExecutionContext:
        if self._context is None:
            raise ConfigError("the engine is closed; open it again")
        return self._context

    def _checked(self, feeds: Mapping[str, Value]) -> dict[str, DeviceArray | NDArray[np.generic]]:
        """The inputs by name, contiguous and of the engine's types."""
        wanted = self._tensors.inputs
        for name in wanted.keys() - feeds.keys():
            raise ConfigError(f"missing input {name}; the engine takes {', '.join(wanted)}")
        for name in feeds.keys() - wanted.keys():
            raise ConfigError(f"there is no input {name}; the engine takes {', '.join(wanted)}")
        values: dict[str, DeviceArray | NDArray[np.generic]] = {}
        for name, dtype in wanted.items():
            value = feeds[name]
            array = as_device_array(name, value) if isinstance(value, OnDevice) else np.ascontiguousarray(value)
            if array.dtype != dtype:
                raise ConfigError(f"{name} is {array.dtype}, needs {dtype}")
            values[name] = array
        return values

    def _set_shapes(self, context: IExecutionContext, shapes: dict[str, tuple[int, ...]], stream: int) -> None:
        if shapes == self._shapes:
            return
        profile = self._tensors.profile_of(shapes)
        self._drop_graph()
        self._shapes = {}
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, stream):
                raise self._failed(f"cannot switch to profile {profile}")
            self._profile = profile
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failed(f"refuses {name} {list(shape)}")
        if unknown := context.infer_shapes():
            raise self._failed(f"misses {', '.join(unknown)}")
        self._shapes = shapes

    def _set_addresses(self, context: IExecutionContext, addresses: dict[str, int]) -> None:
        if addresses == self._addresses:
            return
        self._drop_graph()
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failed(f"refuses the address of {name}")
        self._addresses = addresses

    def _output(self, context: IExecutionContext, name: str, stream: int) -> DeviceArray:
        shape, dtype = tuple(context.get_tensor_shape(name)), self._tensors.outputs[name]
        if min(shape, default=0) < 0:
            raise self._failed(f"does not know the shape of {name} before it runs")
        array = DeviceArray(0, shape, dtype, stream)
        return DeviceArray(self._buffer(name, array.nbytes), shape, dtype, stream)

    def _copied(self, name: str, array: NDArray[np.generic], stream: int) -> int:
        address = self._buffer(name, array.nbytes)
        self._device.upload(array, address, stream)
        return address

    def _buffer(self, name: str, size: int) -> int:
        """The tensor's own memory; it moves only when it must grow."""
        address, held = self._buffers.get(name, (0, -1))
        if size > held:
            if held >= 0:
                self._drop_graph()
                self._device.synchronize(self._last)
                del self._buffers[name]
                self._device.free(address)
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
        return address

    def _run(self, context: IExecutionContext, stream: int) -> None:
        # Never the first run with new shapes: TensorRT does deferred work in it that no graph may hold.
        if self._graph is None and self._ran and self._capture:
            self._graph = self._captured(context)
        if self._graph is not None:
            self._device.launch(self._graph, stream)
        else:
            self._execute(context, stream)
        self._ran = True

    def _captured(self, context: IExecutionContext) -> int | None:
        try:
            return self._device.capture(self.stream, lambda: self._execute(context, self.stream))
        except BuildError as error:
            _log.warning("running without CUDA graphs: %s", error)
            self._capture = False
            return None

    def _drop_graph(self) -> None:
        self._ran = False
        if self._graph is not None:
            self._device.synchronize(self._last)
            self._device.destroy_graph(self._graph)
            self._graph = None

    def _execute(self, context: IExecutionContext, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._failed("cannot run")

    def _failed(self, what: str) -> BuildError:
        self._shapes, self._addresses = {}, {}  # set them all again before the next run
        said = "; ".join(list(self._messages)[-3:])
        return BuildError(f"the engine {what}: {said or 'it gave no reason'}")
