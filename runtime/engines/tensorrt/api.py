"""What is called of TensorRT, as types; each class has the name of TensorRT's own.

mypy holds our calls to these signatures, and tests hold these signatures to the real ones of TensorRT 10, TensorRT 11
and TensorRT-RTX. Nothing here exists when the code runs.
"""

from collections.abc import Sequence
from typing import Any, Protocol


class ITensor(Protocol):
    """An input of a network."""

    name: str

    @property
    def shape(self) -> Sequence[int]: ...


class INetworkDefinition(Protocol):
    """What the parser fills in."""

    @property
    def num_inputs(self) -> int: ...

    def get_input(self, index: int) -> ITensor: ...


class ParserError(Protocol):
    """One refusal of the parser."""

    def desc(self) -> str: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """Reads a graph into a network."""

    @property
    def num_errors(self) -> int: ...

    def get_error(self, index: int) -> ParserError: ...

    def parse_from_file(self, model: str) -> bool: ...


class IOptimizationProfile(Protocol):
    """Shapes to choose kernels for."""

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None: ...  # noqa: A002  # TensorRT's names


class IHostMemory(Protocol):
    """Bytes that TensorRT owns."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    """How fast kernels were when they were last timed."""

    def serialize(self) -> IHostMemory: ...


class IBuilderConfig(Protocol):
    """How to build."""

    profiling_verbosity: Any
    num_compute_capabilities: int

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...

    def get_timing_cache(self) -> ITimingCache: ...


class Builder(Protocol):
    """Makes engines."""

    def create_network(self, flags: int) -> INetworkDefinition: ...

    def create_builder_config(self) -> IBuilderConfig: ...

    def create_optimization_profile(self) -> IOptimizationProfile: ...

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class IRuntimeCache(Protocol):
    """Kernels that TensorRT-RTX compiled for the GPU at hand."""

    def deserialize(self, blob: bytes) -> bool: ...

    def serialize(self) -> IHostMemory: ...


class IRuntimeConfig(Protocol):
    """How an execution context runs; ``cuda_graph_strategy`` and the cache are TensorRT-RTX's alone."""

    cuda_graph_strategy: Any

    def create_runtime_cache(self) -> IRuntimeCache: ...

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool: ...


class IExecutionContext(Protocol):
    """The state of running an engine once at a time."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def infer_shapes(self) -> list[str]: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """An engine that was opened."""

    @property
    def num_io_tensors(self) -> int: ...

    @property
    def num_optimization_profiles(self) -> int: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_mode(self, name: str) -> Any: ...

    def get_tensor_dtype(self, name: str) -> Any: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def get_tensor_location(self, name: str) -> Any: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...

    def create_runtime_config(self) -> IRuntimeConfig: ...

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None: ...


class Runtime(Protocol):
    """Opens engines."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...
