"""Each layer of a bundle alone, on this host's integer kernels: which one computes something else, and by how much.

A layer is cut out of its graph behind the quantizers of what it reads. Fed with codes of all sizes, and with codes at
the ends of their range, which saturate whatever can, the engine's kernel must give what the same nodes give in floating
point. Needs onnx.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle import Bundle, LayerInfo
from tfmq_export.errors import DependencyError
from tfmq_export.runtime.compare import sqnr_db
from tfmq_export.runtime.operations import LAYOUT_OPS, layer_named
from tfmq_export.runtime.ort_runner import OrtRunner
from tfmq_export.runtime.runner import Runner

MULTIPLIERS = frozenset({"Conv", "MatMul", "Gemm"})
SAMPLES = 2  # of every size that may vary
TOKENS, WINDOWS = 16, 3  # rows of a linear layer's input, positions of a kernel less one, where no shape is known
PRODUCT = (TOKENS,) * 4  # of the factors of attention: square, so that they fit however they are turned
LIMIT = 30.0
"""dB. A tie here and there leaves over 40; sums that saturate are wrong numbers."""

OpenGraph = Callable[[Path], Runner]
"""Opens a graph in integers, on the engine that serves the bundle."""


@dataclass(frozen=True, slots=True)
class Codes:
    """What a layer on its own is fed with."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    low: int
    high: int

    def draw(self, rng: np.random.Generator, *, ends: bool) -> NDArray[np.generic]:
        """Any codes, or each one at an end of the range, mostly the upper one."""
        if ends:
            return rng.choice([self.low, self.high], self.shape, p=[0.1, 0.9]).astype(self.dtype)
        return rng.integers(self.low, self.high, self.shape, endpoint=True).astype(self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class SingleLayer:
    """One layer as a graph: codes in, real numbers out."""

    name: str
    model: Any
    inputs: tuple[Codes, ...]


def wrong_layers(bundle: Bundle, open_graph: OpenGraph) -> dict[str, float]:
    """The layers whose integers differ from floating point on this host, with the lowest SQNR in dB, by name."""
    found: dict[str, float] = {}
    for path in filter(None, (bundle.model, bundle.prologue)):
        for layer in single_layers(path, bundle.manifest.layers):
            sqnr = _sqnr_of(layer, open_graph)
            if not sqnr >= LIMIT:
                found[layer.name] = min(sqnr, found.get(layer.name, sqnr))
    return found


def single_layers(path: Path, layers: tuple[LayerInfo, ...]) -> Iterator[SingleLayer]:
    """Every quantized layer of a graph, or each part of one that is computed in parts."""
    onnx = _onnx()
    asked = {layer.name: layer for layer in layers if layer.activation_bits}
    model = onnx.load(str(path))
    # Shapes need no weights, and protobuf ends at 2 GB.
    shaped = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    model.graph.value_info.extend(shaped.graph.value_info)
    extractor, graph = onnx.utils.Extractor(model), model.graph
    producers = {value: node for node in graph.node for value in node.output}
    readers = {value: node for node in graph.node for value in node.input}
    varying = _varying(graph)
    for node in graph.node:
        name = layer_named(node.name, asked) if node.op_type in MULTIPLIERS else None
        if name is None:
            continue
        codes = dict.fromkeys(_codes_of(value, producers) for value in node.input[:2] if value in varying)
        quantize = readers.get(node.output[0])
        result = node.output[0]
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            result = readers[quantize.output[0]].output[0]
        single = extractor.extract_model(list(codes), [result])
        usual = _usual_shape(node, producers, extractor.initializers) if node.input[1] not in varying else PRODUCT
        yield SingleLayer(name, single, tuple(_fixed(value, usual, asked[name]) for value in single.graph.input))


def _sqnr_of(layer: SingleLayer, open_graph: OpenGraph) -> float:
    rng = np.random.default_rng(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        _onnx().save_model(layer.model, str(path))
        with open_graph(path) as integers, OrtRunner(path, integer=False) as reference:
            for ends in (False, True):
                feeds = {codes.name: codes.draw(rng, ends=ends) for codes in layer.inputs}
                (got,), (wanted,) = (runner.infer(feeds).values() for runner in (integers, reference))
                found.append(sqnr_db(wanted, got))
    return min(found)


def _varying(graph: Any) -> set[str]:
    """The values that depend on an input."""
    found = {value.name for value in graph.input}
    for node in graph.node:
        if not found.isdisjoint(node.input):
            found.update(node.output)
    return found


def _codes_of(value: str, producers: Mapping[str, Any]) -> str:
    """The codes that a factor is dequantized from; changed in layout at most on the way."""
    node = producers[value]
    while node.op_type in LAYOUT_OPS:
        node = producers[node.input[0]]
    return str(node.input[0]) if node.op_type == "DequantizeLinear" else value


def _usual_shape(node: Any, producers: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[int, ...]:
    """What a layer may read, by its weight, where no shape is known: behind operations of an engine's own."""
    value = node.input[1]
    while value not in stored:
        value = producers[value].input[0]
    weight = tuple(stored[value].dims)
    if node.op_type == "Conv":
        groups = next((x.i for x in node.attribute if x.name == "group"), 1)
        return (SAMPLES, weight[1] * groups, *(size + WINDOWS for size in weight[2:]))
    return (SAMPLES, TOKENS, weight[0]) if node.op_type == "MatMul" else (TOKENS, weight[1])


def _fixed(value: Any, usual: tuple[int, ...], layer: LayerInfo) -> Codes:
    """Give an input of a cut graph its size; what may vary becomes ``SAMPLES``."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        for size in usual:
            tensor.shape.dim.add().dim_value = size
    for dimension in tensor.shape.dim:
        if not dimension.dim_value:
            dimension.dim_value = SAMPLES
    dtype = np.dtype(_onnx().helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.iinfo(np.int8)
    high = min(int(info.max), (1 << layer.activation_bits) - 1)
    return Codes(value.name, tuple(x.dim_value for x in tensor.shape.dim), dtype, max(int(info.min), -127), high)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.utils
    except ImportError as error:
        raise DependencyError("onnx is not installed, which cuts a graph into layers; pip install onnx") from error
    return onnx
