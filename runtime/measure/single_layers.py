"""Each layer of a bundle alone, on this host's integer kernels: which one computes something else, and by how much.

A layer is cut out of its graph with the quantizers of what it reads, without which engines leave it in floating point.
Fed with codes of all sizes, and with codes at the ends of their range, which saturate whatever can, the engine's kernel
must give what the same nodes give in floating point. Needs onnx.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.errors import DependencyError
from tfmq_export.recipe.names import layer_named
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.graph_file import read_model, read_weights
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.runtime.measure.operations import LAYOUT_OPS
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
class Factor:
    """What a layer on its own is fed with: real numbers that lie on a grid.

    Attributes:
        low: Smallest code of the grid.
        high: Largest.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    low: int
    high: int

    def draw(self, rng: np.random.Generator, *, ends: bool) -> NDArray[np.float32]:
        """Values of any codes, or of each one at an end of the range, mostly the upper one."""
        if ends:
            codes = rng.choice([self.low, self.high], self.shape, p=[0.1, 0.9])
        else:
            codes = rng.integers(self.low, self.high, self.shape, endpoint=True)
        return ((codes - self.zero_point) * np.float64(self.scale)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class SingleLayer:
    """One layer as a graph of real numbers."""

    name: str
    model: Any
    inputs: tuple[Factor, ...]


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
    model = read_model(path)  # of all weights, only those of one layer are ever in memory
    shaped = onnx.shape_inference.infer_shapes(model)
    known = {value.name for value in (*shaped.graph.value_info, *model.graph.input)}
    unknown = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"} - known
    floats = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(unknown)]
    model.graph.value_info.extend([*shaped.graph.value_info, *floats])
    extractor, graph = onnx.utils.Extractor(model), model.graph
    producers = {value: node for node in graph.node for value in node.output}
    readers = {value: node for node in graph.node for value in node.input}
    varying = _varying(graph)
    for node in graph.node:
        name = layer_named(node.name, asked) if node.op_type in MULTIPLIERS else None
        if name is None:
            continue
        quantizers = [_quantizer_of(value, producers) for value in node.input[:2] if value in varying]
        read = {quantizer.input[0]: quantizer for quantizer in quantizers if quantizer is not None}
        if None in quantizers:
            continue  # in floating point, as the receipt says
        quantize = readers.get(node.output[0])
        result = node.output[0]
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            result = readers[quantize.output[0]].output[0]
        single = extractor.extract_model(list(read), [result])
        read_weights(single, path)
        stored = extractor.initializers
        usual = _usual_shape(node, producers, stored) if node.input[1] not in varying else PRODUCT
        yield SingleLayer(
            name, single, tuple(_factor(value, usual, read[value.name], stored) for value in single.graph.input)
        )


def _sqnr_of(layer: SingleLayer, open_graph: OpenGraph) -> float:
    rng = np.random.default_rng(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        _onnx().save_model(layer.model, str(path))
        with open_graph(path) as integers, OrtRunner(path, integer=False) as reference:
            for ends in (False, True):
                feeds = {factor.name: factor.draw(rng, ends=ends) for factor in layer.inputs}
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


def _quantizer_of(value: str, producers: Mapping[str, Any]) -> Any | None:
    """The quantizer that a factor comes from, changed in layout or clipped at most on the way."""
    node = producers.get(value)
    while node is not None and node.op_type in LAYOUT_OPS | {"DequantizeLinear", "Clip"}:
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


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


def _factor(value: Any, usual: tuple[int, ...], quantizer: Any, stored: Mapping[str, Any]) -> Factor:
    """Give an input of a cut graph its size, and say what it is fed with; what may vary becomes ``SAMPLES``."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        for size in usual:
            tensor.shape.dim.add().dim_value = size
    rank = len(tensor.shape.dim)
    likely = (SAMPLES,) * (rank - len(usual)) + usual[max(0, len(usual) - rank) :]
    for axis, dimension in enumerate(tensor.shape.dim):
        if not dimension.dim_value:  # the batch, and what depends on the length of a prompt
            dimension.dim_value = likely[axis] if axis else SAMPLES
    scale, zero_point = (_onnx().numpy_helper.to_array(stored[name]) for name in quantizer.input[1:3])
    info = np.iinfo(zero_point.dtype)
    shape = tuple(x.dim_value for x in tensor.shape.dim)
    return Factor(value.name, shape, float(scale), int(zero_point), int(info.min), int(info.max))


def _onnx() -> Any:
    try:
        import onnx
        import onnx.utils
    except ImportError as error:
        raise DependencyError("onnx is not installed, which cuts a graph into layers; pip install onnx") from error
    return onnx
