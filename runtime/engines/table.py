"""The engines, one row each.

To add one: a folder with a ``runner`` and a ``receipt``, a row here, and a ``Target`` for the graphs it wants, as
``tests/runtime/engines/test_table.py`` does. A row's functions import the engine's library when they are called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime.engines.onnxruntime import runner as ort
from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.runtime.engines.openvino import runner as openvino
from tfmq_export.runtime.engines.openvino.receipt import realized_on_openvino
from tfmq_export.runtime.engines.qnn import library as qnn
from tfmq_export.runtime.engines.qnn.receipt import realized_on_qnn
from tfmq_export.runtime.engines.qnn.runner import open_graph as open_on_npu
from tfmq_export.runtime.engines.tensorrt import library as tensorrt
from tfmq_export.runtime.engines.tensorrt.receipt import realized_on_tensorrt
from tfmq_export.runtime.engines.tensorrt.runner import open_graph as open_built
from tfmq_export.runtime.measure.receipt import Receipt
from tfmq_export.runtime.runner import GraphRequest, Runner
from tfmq_export.target import TARGETS

FALLBACK = "onnxruntime"
"""Computes the same numbers as every other, if not in integers."""


class ReceiptOf(Protocol):
    """Loads a graph, a bundle's or one of its own, as the engine would run it, and looks up every layer in it."""

    def __call__(
        self, model: Path | Bundle, requested: Sequence[LayerInfo], /, *, macs: int | None = None
    ) -> Receipt: ...


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs graphs.

    Attributes:
        name: Of its folder, of the backend that it is by default, and of itself in a ``Target``.
        title: Its name for people.
        open_graph: Makes a runner.
        receipt: Its own account of a graph.
        versions: Of its library, by backend: the names that it is asked for by.
        installed: Whether its receipts can be had here.
        missing: What to say where they cannot, with the way out; ``{target}`` is whose receipt it would be.
        precisions: What may compute where nothing is quantized; empty where the graph's own types say.
        every_target: Whether it computes the graphs of all targets rightly, not just those made for it.
        built: Whether it runs what was built from a bundle's graph, not the graph itself.
        serves: Whether "auto" takes it on this machine; where it is installed if None.
        floats_elsewhere: Whether other engines give reference numerics of its graphs, and no integers.
    """

    name: str
    title: str
    open_graph: Callable[[GraphRequest], Runner]
    receipt: ReceiptOf
    versions: Mapping[str, Callable[[], str]]
    installed: Callable[[], bool]
    missing: str
    precisions: tuple[str, ...] = ()
    every_target: bool = False
    built: bool = False
    serves: Callable[[], bool] | None = None
    floats_elsewhere: bool = False

    @property
    def usual(self) -> bool:
        """Whether graphs that were made for it run on it here, where nobody says on what."""
        return not self.built and (self.serves or self.installed)()

    @property
    def targets(self) -> tuple[str, ...]:
        """Those whose graphs it computes rightly."""
        return tuple(name for name, target in TARGETS.items() if self.every_target or target.engine == self.name)


def _is_there(version: Callable[[], str]) -> bool:
    """Whether a library can be imported here."""
    try:
        version()
    except DependencyError:
        return False
    return True


_ENGINES = (
    Engine(
        "onnxruntime",
        "ONNX Runtime",
        open_graph=ort.open_graph,
        receipt=realized_on_ort,
        versions=dict.fromkeys(ort.BACKENDS, ort.version),
        installed=partial(_is_there, ort.version),
        missing=ort.MISSING,
        every_target=True,
    ),
    # Of graphs made for others some quantized outputs come out as zeros, without a word (seen with 2026.4).
    Engine(
        "openvino",
        "OpenVINO",
        open_graph=openvino.open_graph,
        receipt=realized_on_openvino,
        versions={"openvino": openvino.version},
        installed=partial(_is_there, openvino.version),
        missing=openvino.MISSING,
        precisions=openvino.PRECISIONS,
    ),
    Engine(
        "tensorrt",
        "TensorRT",
        open_graph=open_built,
        receipt=realized_on_tensorrt,
        versions={flavour: partial(tensorrt.version, flavour) for flavour in tensorrt.FLAVOURS},
        installed=tensorrt.can_prove,
        missing=tensorrt.MISSING,
        built=True,
    ),
    # Its emulator takes minutes for what a phone does in milliseconds: "auto" wants the NPU.
    Engine(
        "qnn",
        "onnxruntime-qnn",
        open_graph=open_on_npu,
        receipt=realized_on_qnn,
        versions={"qnn": qnn.version},
        installed=qnn.is_here,
        missing=qnn.MISSING,
        serves=qnn.has_npu,
        floats_elsewhere=True,
    ),
)

ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in _ENGINES}


def engine_named(backend: str, *, built: bool = True) -> Engine:
    """The engine that a backend's name asks for.

    Args:
        built: Whether it may be one that runs what was built from a graph.
    Raises:
        ConfigError: there is no such backend.
    """
    for engine in ENGINES.values():
        if backend in engine.versions and (built or not engine.built):
            return engine
    known = [name for engine in ENGINES.values() for name in engine.versions]
    raise ConfigError(f"backend {backend!r} is unknown; use one of {', '.join(['auto', *known])}")
