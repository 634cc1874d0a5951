"""TensorRT and TensorRT-RTX engines, opened from a file.

What runs is ``EngineSession``, one per thread.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, EngineInfo
from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import BuildError, ConfigError, LoadError
from tfmq_export.runtime.engines.tensorrt.api import ICudaEngine, IRuntimeCache, IRuntimeConfig, Runtime
from tfmq_export.runtime.engines.tensorrt.choose import EngineHost, choose_engine
from tfmq_export.runtime.engines.tensorrt.cuda_driver import CudaDevice
from tfmq_export.runtime.engines.tensorrt.library import FLAVOURS, import_tensorrt, recorder, version
from tfmq_export.runtime.engines.tensorrt.session import EngineSession
from tfmq_export.runtime.engines.tensorrt.tensors import EngineTensors, ShapeRange
from tfmq_export.runtime.runner import GraphRequest, one_line

_log = logging.getLogger(__name__)


class TrtRunner:
    """An engine on one GPU; threads may call ``infer`` at the same time, each on an execution context of its own.

    Close it when no thread is inside.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx": the library that built the engine.
        device: Ordinal of the GPU, or one that was opened already.
        cuda_graphs: Whether runs that repeat become CUDA graphs.
        runtime_cache: File of the kernels that TensorRT-RTX compiles for this GPU when it opens the engine; read if it
            is there, written on closing.
    Raises:
        LoadError: there is no such file.
        DependencyError: the library is not installed, or there is no driver or no GPU.
        BuildError: the library cannot open the engine: another version, another GPU, or not an engine at all.
    """

    def __init__(
        self,
        engine_path: Path,
        *,
        flavour: str,
        device: int | CudaDevice = 0,
        cuda_graphs: bool = True,
        runtime_cache: Path | None = None,
    ) -> None:
        if flavour not in FLAVOURS:
            raise ConfigError(f"flavour {flavour!r} is unknown; use one of {', '.join(FLAVOURS)}")
        if runtime_cache is not None and flavour != "tensorrt-rtx":
            raise ConfigError("only TensorRT-RTX keeps a runtime cache; leave runtime_cache out")
        if not engine_path.is_file():
            raise LoadError(f"{engine_path}: no such engine; build it with tfmq-build")
        trt = import_tensorrt(flavour)
        self._path = engine_path
        self._device = CudaDevice(device) if isinstance(device, int) else device
        self._cuda_graphs = cuda_graphs
        self._own_graphs = flavour == "tensorrt"
        self._messages: deque[str] = deque(maxlen=8)
        self._logger = recorder(trt, self._note)
        self._trt = trt
        self._cache_path = runtime_cache
        self._runtime: Runtime | None = None
        self._engine: ICudaEngine | None = None
        self._config: IRuntimeConfig | None = None
        self._cache: IRuntimeCache | None = None
        try:
            with self._device.current():
                self._runtime = trt.Runtime(self._logger)
                self._engine = self._open(self._runtime, engine_path.read_bytes())
                self._config = self._configure(self._engine)
            self._tensors = _tensors(trt, self._engine, engine_path)
        except BaseException:
            self._release()
            raise
        self._idle: deque[EngineSession] = deque()
        self._lock = threading.Lock()
        self.inputs: tuple[str, ...] = tuple(self._tensors.inputs)
        self.outputs: tuple[str, ...] = tuple(self._tensors.outputs)
        self.engine = f"{FLAVOURS[flavour]} {trt.__version__} on {self._device.name}"

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the graph once.

        Raises:
            ConfigError: a missing or unknown input, a wrong type, or a shape the engine was not built for.
            BuildError: TensorRT or the driver failed, with their own words; the runner stays usable.
        """
        with self._borrowed({name: tuple(np.shape(value)) for name, value in feeds.items()}) as session:
            return session.infer(feeds)

    def smallest_batch(self, name: str) -> int:
        """Rows that an input has at least, in any profile."""
        return min(profile[name].smallest[0] for profile in self._tensors.profiles)

    @contextlib.contextmanager
    def session(self) -> Iterator[EngineSession]:
        """An execution context for this thread alone, to ``enqueue`` on."""
        session = self._new_session()
        try:
            yield session
        finally:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._engine is None:
            return
        while self._idle:
            self._idle.pop().close()
        try:
            self._save_cache()
        finally:
            self._release()

    def _release(self) -> None:
        """Let go of what lives on the GPU, the youngest first, and of the GPU last."""
        self._cache = None
        self._config = None
        self._engine = None
        self._runtime = None
        self._device.close()

    @contextlib.contextmanager
    def _borrowed(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[EngineSession]:
        """An idle session, one that ran these shapes last where there is one; what failed is not used again."""
        with self._lock:
            session = next((each for each in self._idle if each.shapes == shapes), None)
            if session is not None:
                self._idle.remove(session)
            elif self._idle:
                session = self._idle.popleft()
        session = session or self._new_session()
        try:
            yield session
        except ConfigError:
            self._give_back(session)  # refused before anything ran
            raise
        except BaseException:
            with contextlib.suppress(BuildError):
                session.close()
            raise
        self._give_back(session)

    def _give_back(self, session: EngineSession) -> None:
        with self._lock:
            self._idle.append(session)

    def _new_session(self) -> EngineSession:
        if self._engine is None or self._config is None:
            raise ConfigError(f"{self._path}: the runner is closed; open it again")
        with self._device.current():
            context = self._engine.create_execution_context(self._config)
        if context is None:
            raise BuildError(f"{self._path}: no execution context: {self._said()}; is the GPU's memory used up?")
        return EngineSession(
            context,
            self._device,
            self._tensors,
            capture=self._cuda_graphs and self._own_graphs,
            messages=self._messages,
        )

    def _open(self, runtime: Runtime, data: bytes) -> ICudaEngine:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BuildError(
                f"{self._path}: this is no engine that {self._trt.__name__} {self._trt.__version__} opens on "
                f"{self._device.name} (SM {self._device.capability}): {self._said()}; build it again with tfmq-build"
            )
        return engine

    def _configure(self, engine: ICudaEngine) -> IRuntimeConfig:
        config = engine.create_runtime_config()
        if self._own_graphs:
            return config
        if self._cuda_graphs:
            # It also knows when its kernels for new shapes are ready, which a capture from outside does not.
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache_path is not None:
            self._cache = config.create_runtime_cache()
            if self._cache_path.is_file() and not self._cache.deserialize(self._cache_path.read_bytes()):
                _log.warning("%s: of another GPU, driver or version; it will be written anew", self._cache_path)
            config.set_runtime_cache(self._cache)
        return config

    def _save_cache(self) -> None:
        if self._cache_path is not None and self._cache is not None:
            with replaced_file(self._cache_path) as partial:
                partial.write_bytes(memoryview(self._cache.serialize()))

    def _note(self, severity: str, text: str) -> None:
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self._messages.append(one_line(text))
        _log.debug("%s: %s", severity, text)

    def _said(self) -> str:
        return "; ".join(list(self._messages)[-2:]) or "it gave no reason"


def open_graph(request: GraphRequest) -> TrtRunner:
    """Open the engine built from one graph of a bundle that runs on this machine's first GPU.

    Raises:
        ConfigError: none was built for it, or reference numerics are asked for.
        DependencyError: the library is not installed, or there is no GPU.
        LoadError: the engine is missing or altered.
        BuildError: the library refuses it.
    """
    graph, flavour, bundle = request.graph, request.backend, request.bundle
    if not request.integer:
        raise ConfigError(f"{flavour} has no reference numerics; use the onnxruntime backend")
    engines = [] if bundle is None else _built_from(graph, bundle)
    if bundle is None or not any(each.flavour == flavour for each in engines):
        raise ConfigError(f"{graph}: no engine for {FLAVOURS[flavour]} was built from it; build one with tfmq-build")
    installed = version(flavour)
    device = CudaDevice()
    try:
        chosen = choose_engine(engines, EngineHost(flavour, installed, device.capability))
        path = bundle.root / chosen.file
        # Comparing sizes costs nothing; a hash, which ``load`` compares unless told otherwise, reads the whole file.
        if path.is_file() and path.stat().st_size != chosen.size:
            raise LoadError(f"{path}: {path.stat().st_size} bytes, the manifest says {chosen.size}; build it again")
        return TrtRunner(path, flavour=flavour, device=device)
    except BaseException:
        device.close()
        raise


def _built_from(graph: Path, bundle: Bundle) -> list[EngineInfo]:
    name = graph.relative_to(bundle.root).as_posix()
    return [each for each in bundle.manifest.engines if each.graph == name]


def _tensors(trt: Any, engine: ICudaEngine, path: Path) -> EngineTensors:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in names:
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BuildError(f"{path}: {name} is a shape that the engine wants on the host; this runner has none such")
    types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    profiles = [
        {name: _shapes(engine, name, index) for name in inputs} for index in range(engine.num_optimization_profiles)
    ]
    return EngineTensors(
        inputs={name: types[name] for name in inputs},
        outputs={name: types[name] for name in names if name not in inputs},
        profiles=tuple(profiles),
    )


def _shapes(engine: ICudaEngine, name: str, profile: int) -> ShapeRange:
    fixed = tuple(engine.get_tensor_shape(name))
    if -1 not in fixed:
        return ShapeRange(fixed, fixed, fixed)
    smallest, usual, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile))
    return ShapeRange(smallest, usual, largest)
