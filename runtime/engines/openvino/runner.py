"""OpenVINO on the CPU; the only file that imports it."""

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.runner import GraphRequest, one_line

PRECISIONS = ("f32", "bf16", "f16")
"""What may compute the layers that are not quantized; a CPU without the type falls back to f32."""

MISSING = "openvino is not installed; pip install openvino"

OWN_SHAPES = 3
"""Sets of input shapes that get a compiled graph of their own; a bundle's self-test brings the first."""

NO_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
"""Without kernels that OpenVINO generates for chains of small operations and whole attentions."""

Shapes = Mapping[str, tuple[int, ...]]

# "Exception from src/inference/src/cpp/core.cpp:132:" and the like say where, not what.
_TRACE = re.compile(r"(Exception from |Check '.*' failed at )?src/\S+\.[ch]pp:\d+:\s*")
_SINK = "/sink_port_0"


@dataclass(frozen=True, slots=True)
class RuntimeOperation:
    """One operation of the graph as OpenVINO runs it.

    Attributes:
        kind: Such as "Convolution" or "FullyConnected".
        kernel: Implementation and type it computes in, such as "brgconv_avx512_I8".
        origins: Its own name, and those of the nodes it says it was made of.
        reads: Types of what it reads, such as "i8" and "f32".
        sources: Names of the operations it reads.
    """

    kind: str
    kernel: str
    origins: tuple[str, ...]
    reads: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


class OpenVinoRunner:
    """One graph; threads may call ``infer`` at the same time.

    The first sets of input shapes each get a compiled graph of their own, made when they first come: with open
    shapes the same graph takes 1.4 times as long. Later sets share one graph with open shapes, so that a host with
    many batch sizes does not compile for ever.

    Args:
        threads: Threads of one inference; None leaves the choice to OpenVINO.
        precision: What the layers that are not quantized compute in. OpenVINO's own default is bf16 on some machines
            and f32 on others; f32 gives the same numbers everywhere.
        integer: False computes QDQ graphs in floating point: the reference numerics.
    Raises:
        LoadError: there is no such file.
        BuildError: OpenVINO refuses the graph.
    """

    def __init__(
        self, model_path: Path, *, threads: int | None = None, precision: str = "f32", integer: bool = True
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        if not model_path.is_file():
            raise LoadError(f"{model_path}: no such file; compile the model first")
        self._core: Any = _openvino().Core()
        self._path = model_path
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            # Pinned, two processes of one thread each share the first core while the others idle.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        if not integer:
            self._options["LP_TRANSFORMS_MODE"] = "NO"
        try:
            model = self._core.read_model(str(model_path))
        except Exception as error:  # of classes that differ by frontend and share no base
            raise BuildError(
                f"{model_path}: OpenVINO refuses this graph: {_message(error)}; a newer openvino than "
                f"{version().partition('-')[0]} may take it, or a bundle for another --target"
            ) from error
        if _attentions_meet(model):
            self._options |= NO_SNIPPETS
        self._model: Any = model
        self._layers = frozenset(node.get_friendly_name() for node in model.get_ops() if _has_stored_weight(node))
        self._ports = {port.node.friendly_name: port for port in model.inputs}
        self.inputs: tuple[str, ...] = tuple(self._ports)
        self.outputs: tuple[str, ...] = tuple(
            result.get_friendly_name().removesuffix(_SINK) for result in model.get_results()
        )
        self.engine = f"openvino {version()}, floats in {precision}"
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph] = {}  # by input shapes
        self._open_graph: _Graph | None = None
        self._compiling = threading.Lock()

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the graph once; input shapes seen for the first time are compiled for.

        Raises:
            BuildError: a wrong input, or OpenVINO's own message; the runner stays usable.
        """
        if self._model is None:
            raise ConfigError(f"{self._path}: the runner is closed; open it again")
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        if wrong := self._wrong_with(arrays):
            raise BuildError(
                f"{self._path}: OpenVINO cannot run on these inputs: {wrong}; check the inputs {', '.join(self.inputs)}"
            )
        graph = self._graph_for({name: array.shape for name, array in arrays.items()})
        try:
            values = graph.infer(arrays)
        except RuntimeError as error:
            raise BuildError(
                f"{self._path}: OpenVINO failed: {_message(error)}; check the inputs {', '.join(self.inputs)}"
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    def operations(self) -> tuple[RuntimeOperation, ...]:
        """The graph as OpenVINO runs it on one sample, in order; every open size is 1.

        With open shapes it would choose some kernels at the first call only.

        Raises:
            BuildError: OpenVINO cannot compile the graph, or not for one sample.
        """
        sizes = {
            name: [1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
            for name, port in self._ports.items()
        }
        shapes = {name: tuple(shape) for name, shape in sizes.items()}
        model = self._compile(self._reshaped(shapes)).get_runtime_model()
        return tuple(_operation(node) for node in model.get_ordered_ops())

    def settings(self) -> dict[str, str]:
        """What the graphs compiled so far run on."""
        graphs = list(self._graphs.values())
        return {"engine": f"openvino {version().partition('-')[0]}", **(graphs[0].settings() if graphs else {})}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._model, self._open_graph = None, None
        self._graphs.clear()

    def _wrong_with(self, arrays: Mapping[str, NDArray[np.generic]]) -> str:
        """What the engine must not see.

        An input that is missing or of another rank or channel count it takes for empty, answers with an empty result,
        and may crash the process afterwards; another type it converts without a word.
        """
        if missing := self._ports.keys() - arrays.keys():
            return f"missing {', '.join(sorted(missing))}"
        if unknown := arrays.keys() - self._ports.keys():
            return f"there is no input {', '.join(sorted(unknown))}"
        for name, port in self._ports.items():
            array, wanted, shape = arrays[name], port.element_type.to_dtype(), port.partial_shape
            if array.dtype != wanted:
                return f"{name} is {array.dtype}, needs {wanted}"
            fits = array.ndim == len(shape) and all(
                dimension.is_dynamic or size == dimension.get_length()
                for size, dimension in zip(array.shape, shape, strict=True)
            )
            if not fits:
                return f"{name} has shape {list(array.shape)}, needs {shape}"
        return ""

    def _graph_for(self, shapes: Shapes) -> "_Graph":
        key = tuple(shapes[name] for name in self.inputs)
        if key in self._graphs:  # without waiting for a thread that compiles for other shapes
            return self._graphs[key]
        with self._compiling:
            if key not in self._graphs:
                # Even for open shapes: given inputs that do not fit each other, that graph may answer with the result
                # of the call before.
                model = self._reshaped(shapes)
                if len(self._graphs) < OWN_SHAPES:
                    self._graphs[key] = _Graph(self._compile(model))
                else:
                    self._open_graph = self._open_graph or _Graph(self._compile(self._model))
                    self._graphs[key] = self._open_graph
            return self._graphs[key]

    def _reshaped(self, shapes: Shapes) -> Any:
        """The graph for these shapes only, sharing the weights."""
        model = self._model.clone()
        try:
            model.reshape({port: list(shapes[name]) for name, port in zip(self.inputs, model.inputs, strict=True)})
        except RuntimeError as error:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BuildError(
                f"{self._path}: the graph is not defined for {given}: {_message(error)}; check the inputs"
            ) from error
        return model

    def _compile(self, model: Any) -> Any:
        try:
            compiled = self._core.compile_model(model, "CPU", self._options)
            if self._layers & _fused_away(compiled):
                # Short chains of narrow linear layers become one generated kernel, in fp32.
                compiled = self._core.compile_model(model, "CPU", self._options | NO_SNIPPETS)
            return compiled
        except RuntimeError as error:
            raise BuildError(
                f"{self._path}: OpenVINO cannot compile this graph: {_message(error)}; a newer openvino than "
                f"{version().partition('-')[0]} may, or a bundle for another --target"
            ) from error


class _Graph:
    """A compiled graph and its idle requests, one for each thread at most."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: deque[Any] = deque()

    def infer(self, arrays: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        values = list(request.infer(dict(arrays)).values())  # copies; one that fails is not used again
        self._idle.append(request)
        return values

    def settings(self) -> dict[str, str]:
        asked = {"threads": "INFERENCE_NUM_THREADS", "precision": "INFERENCE_PRECISION_HINT", "streams": "NUM_STREAMS"}
        found = {name: self._compiled.get_property(key) for name, key in asked.items()}
        return {name: getattr(value, "to_string", value.__str__)() for name, value in found.items()}


def _has_stored_weight(node: Any) -> bool:
    """Whether a node multiplies by a constant, dequantized or not."""
    if node.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
        return False
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    return str(source.get_type_name()) == "Constant"


def _attentions_meet(model: Any) -> bool:
    """Whether the results of two attentions are put together before any other layer reads them (Lumina Next).

    OpenVINO 2026.4 makes one generated kernel of each attention and what follows it, and ends the process (SIGSEGV)
    where two claim the same addition.
    """
    reaching: dict[str, frozenset[str]] = {}  # attentions by the node that they reach
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        before = [value.get_source_output().get_node() for value in node.inputs()]
        if kind == "MatMul" and _is_softmax(before[0]):
            reaching[name] = frozenset({name})
        elif kind in ("Transpose", "Add", "Subtract", "Multiply", "Divide"):
            found = frozenset[str]().union(*(reaching.get(each.get_friendly_name(), ()) for each in before))
            if len(found) > 1:
                return True
            reaching[name] = found
    return False


def _is_softmax(node: Any) -> bool:
    """Whether a node is a Softmax, masked afterwards or not."""
    while node.get_type_name() == "Multiply":
        node = node.input_value(0).get_node()
    return str(node.get_type_name()) == "Softmax"


def _fused_away(compiled: Any) -> set[str]:
    """Names of the nodes that generated kernels compute."""
    operations = [_operation(node) for node in compiled.get_runtime_model().get_ops()]
    return {name.removesuffix("_original") for item in operations if item.kind == "Subgraph" for name in item.origins}


def open_graph(request: GraphRequest) -> OpenVinoRunner:
    """Open a graph on the CPU."""
    precision = request.precision or PRECISIONS[0]
    return OpenVinoRunner(request.graph, threads=request.threads, precision=precision, integer=request.integer)


def version() -> str:
    """Version of the installed OpenVINO."""
    return str(_openvino().__version__)


def _openvino() -> ModuleType:
    try:
        import openvino
    except ImportError as error:
        raise DependencyError(MISSING) from error
    module: ModuleType = openvino
    return module


def _message(error: BaseException) -> str:
    return one_line(_TRACE.sub("", str(error)))


def _operation(node: Any) -> RuntimeOperation:
    facts = node.get_rt_info()
    kind, kernel, origins = (_text(facts, key) for key in ("layerType", "primitiveType", "originalLayersNames"))
    read = [value.get_source_output() for value in node.inputs()]
    types = tuple(value.get_element_type().get_type_name() for value in read)
    sources = tuple(value.get_node().get_friendly_name() for value in read)
    names = (node.get_friendly_name(), *filter(None, origins.split(",")))
    return RuntimeOperation(kind, kernel, names, types, sources)


def _text(facts: Any, key: str) -> str:
    if key not in facts:
        return ""
    found = facts[key]
    return str(getattr(found, "value", found))
