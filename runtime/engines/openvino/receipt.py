"""The receipt of OpenVINO: its runtime model names, for every operation, the nodes it was made of and its kernel.

Whether a layer computes in integers is the kernel's type (``brgconv_avx512_I8``). The precision OpenVINO reports
beside it is no proof: a MatMul on packed 4-bit weights says "i4" and multiplies in f32. Attention becomes one
operation, whose kernel is named after q alone; there the proof is that every factor reaches it as integers. The runtime
model does not say why a layer was lost, so the reason is looked up in the graph OpenVINO was given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.recipe.names import layer_named, node_name
from tfmq_export.runtime.engines.openvino.runner import OpenVinoRunner, RuntimeOperation
from tfmq_export.runtime.measure.operations import (
    LAYOUT_OPS,
    Operation,
    dequantizer,
    layer_of,
    operations_of,
    producers_of,
    read_graph,
)
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt, total_macs

PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul", "Deconvolution"})
FUSED = "Subgraph"
"""Generated code for several nodes: elementwise ones, and both products of an attention."""

FOLDED = "Const"
"""What OpenVINO computes once, when it loads the graph."""

_SOURCE_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
_INTEGER = re.compile(r"_[iu]8$", re.IGNORECASE)

_INTEGER_TYPES = frozenset({"i8", "u8"})
_INT8, _UINT8 = 3, 2  # onnx.TensorProto.INT8, .UINT8


def realized_on_openvino(
    model: Path | Bundle, requested: Sequence[LayerInfo], *, precision: str = "f32", macs: int | None = None
) -> Receipt:
    """Compile a graph for OpenVINO's CPU plugin, on one sample, and look up every layer in its runtime model.

    Args:
        requested: The layers and the precision asked for.
        precision: What the layers that are not quantized compute in.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
    Raises:
        DependencyError: openvino is not installed.
        BuildError: OpenVINO refuses the graph.
    """
    path = model.model if isinstance(model, Bundle) else model
    with OpenVinoRunner(path, threads=1, precision=precision) as runner:
        operations = runner.operations()
    return receipt_of(operations, Source.read(path), requested, total_macs(requested, macs))


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The graph OpenVINO was given.

    Attributes:
        products: Its convolutions and matrix products, by name.
        producers: Who computes each value.
        constants: Stored tensors by name, as the file has them.
        aliases: Other names under which OpenVINO keeps a product: of what it folds into it (a bias, the half of a
            SiLU), of the output behind it.
    """

    products: Mapping[str, Operation]
    producers: Mapping[str, Operation]
    constants: Mapping[str, Any]
    aliases: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Source":
        graph = read_graph(path)
        operations = operations_of(graph)
        producers = producers_of(operations)
        constants = {value.name: value for value in graph.initializer}
        aliases = {}
        ends = [(output.name, producers.get(output.name)) for output in graph.output]
        for alias, operation in [*ends, *((operation.name, operation) for operation in operations)]:
            while operation is not None and operation.op not in _SOURCE_PRODUCTS:
                varying = [value for value in operation.inputs if value not in constants]
                passes_on = operation.op in LAYOUT_OPS | {"Identity", "Add", "Mul"} and len(varying) == 1
                operation = producers.get(varying[0]) if passes_on else None
            if operation is not None:
                aliases[alias] = operation.name
        products = {operation.name: operation for operation in operations if operation.op in _SOURCE_PRODUCTS}
        return cls(products, producers, constants, aliases)

    def operands(self, name: str) -> tuple[Operation | None, Operation | None]:
        """The DequantizeLinear in front of a product's input and of its weight, where there is one."""
        x, weight = self.products[name].inputs[:2]
        return dequantizer(x, self.producers), dequantizer(weight, self.producers)

    def products_in(self, item: RuntimeOperation) -> set[str]:
        """Products an operation was made of; usually one, but OpenVINO fuses some convolutions with the one before."""
        stems = {origin.partition("/")[0].removesuffix("_original") for origin in item.origins}
        aliased = self.products.keys() & {self.aliases.get(stem, stem) for stem in stems}
        if item.kind != FUSED:
            return aliased or self._by_weight(item)
        # Its other nodes are there in their own right; but a factor behind the scores of an attention takes their name.
        named = self.products.keys() & stems
        return named | {name for name in aliased if self._of_activations(name)} if named else named

    def _by_weight(self, item: RuntimeOperation) -> set[str]:
        """The product whose stored weight an operation reads, where it has lost its name.

        Behind a layer that is added to a table's row, OpenVINO swaps its scale with the sum, and calls the layer
        ``Multiply_22438``.
        """
        weights = {name: self.operands(name)[1] for name in self.products}
        readers = [name for name, dq in weights.items() if dq is not None and dq.inputs[0] in item.sources]
        return set(readers) if len(readers) == 1 else set()

    def _of_activations(self, name: str) -> bool:
        """Whether neither factor of a product is stored."""
        (x, weight), operands = self.products[name].inputs[:2], self.operands(name)
        roots = [value if dq is None else dq.inputs[0] for value, dq in zip((x, weight), operands, strict=True)]
        return all(_stored(root, self.producers) not in self.constants for root in roots)

    def runs_integers(self, item: RuntimeOperation) -> bool:
        """Whether an operation multiplies integers, in every product it was made of."""
        if item.kind != FUSED:
            return _has_integer_kernel(item)
        # (q k^T) v has a factor more than it has products; each comes in as integers, or is cast where it is read.
        integers = sum(type_name in _INTEGER_TYPES for type_name in item.reads)
        return _has_integer_kernel(item) and integers > len(self.products_in(item))


def receipt_of(
    operations: Sequence[RuntimeOperation], source: Source, requested: Sequence[LayerInfo], macs: int
) -> Receipt:
    """Compare what was asked with a runtime model."""
    names = {layer.name for layer in requested}
    owners = {name: layer_of(product, names, source.producers) for name, product in source.products.items()}
    found: dict[str, list[RuntimeOperation]] = {name: [] for name in names}
    strays = []
    alone = {name for item in operations if item.kind in PRODUCTS for name in source.products_in(item)}
    by_node = {node_name(name): name for name in names}
    for item in operations:
        if item.kind == FOLDED:  # of a constant input, as the one style of HunyuanDiT; computed once, at no cost
            for origin in by_node.keys() & {*item.origins}:
                found[by_node[origin]].append(item)
        if item.kind not in PRODUCTS | {FUSED}:
            continue
        # Generated code may have the bias or the scale of a layer that multiplies elsewhere.
        for name in source.products_in(item) - (alone if item.kind == FUSED else set()):
            owner = owners[name]
            if owner is not None:
                found[owner].append(item)
            elif not source.runs_integers(item) and all(source.operands(name)):
                strays.append((name, f"runs as {item.kind} ({item.kernel}) on dequantized operands"))
    rows = [
        LayerReceipt(
            layer,
            tuple(sorted({f"{item.kind} {item.kernel}" for item in found[layer.name]})),
            _loss(layer, found[layer.name], source),
        )
        for layer in requested
    ]
    return Receipt(tuple(rows), tuple(strays), macs)


def _loss(layer: LayerInfo, found: Sequence[RuntimeOperation], source: Source) -> str:
    """Why a layer is not what was asked; empty where it is."""
    if not layer.activation_bits:
        integer = [item for item in found if source.runs_integers(item)]
        return f"asked to stay float, runs as {integer[0].kind} ({integer[0].kernel})" if integer else ""
    if not found:
        return f"no operation {node_name(layer.name)} in OpenVINO's runtime model; was it renamed or folded?"
    for item in found:
        if item.kind != FOLDED and not source.runs_integers(item):
            (name, *_) = sorted(source.products_in(item), key=lambda name: layer_named(name, (layer.name,)) is None)
            return f"runs as {item.kind} ({item.kernel}) in float: {_why_float(name, source, item)}"
    return ""


def _has_integer_kernel(item: RuntimeOperation) -> bool:
    return _INTEGER.search(item.kernel) is not None


def _why_float(name: str, source: Source, item: RuntimeOperation) -> str:
    x, weight = source.operands(name)
    if item.kind == FUSED and x is not None and weight is not None:
        return "it is one with the other product of its attention, whose factors are not all integers"
    if x is None:
        return "its input does not come straight from DequantizeLinear"
    if weight is None:
        return "its weight or second factor is not quantized"
    codes = source.constants.get(weight.inputs[0])
    if codes is not None and codes.data_type != _INT8:
        return f"its weight is stored as {_type_name(codes)}; store int8 codes, or packed ones behind a Cast to int8"
    if _any_nonzero(source.constants.get(_input(weight, 2))):
        return "its weight has a zero point that is not 0"
    if len(_readers(_input(weight, 2), source)) > 1:
        return "weights that broadcast it in two ways share its zero point; give each kind of layer its own"
    scale, zero_point = (source.constants.get(_input(x, place)) for place in (1, 2))
    if scale is not None and any(size > 1 for size in scale.dims):
        return "its input has a scale for each channel; put the factors in a Mul in front of QuantizeLinear"
    if zero_point is not None and zero_point.data_type not in (_INT8, _UINT8):
        return f"its input is quantized to {_type_name(zero_point)}, which has no kernel"
    return "unknown; see the graph of each pass with --dump-dir"


def _readers(zero_point: str, source: Source) -> set[tuple[str, int]]:
    """Kinds of layer whose weight has this zero point, each with the rank of the weight."""
    readers = set()
    for name, product in source.products.items():
        _, weight = source.operands(name)
        if weight is not None and zero_point and _input(weight, 2) == zero_point:
            codes = source.constants.get(_stored(weight.inputs[0], source.producers))
            readers.add((product.op, 0 if codes is None else len(codes.dims)))
    return readers


def _stored(value: str, producers: Mapping[str, Operation]) -> str:
    """The constant that codes are unpacked from."""
    while value in producers and producers[value].op in ("Cast", "Mul"):
        value = producers[value].inputs[0]
    return value


def _input(operation: Operation, place: int) -> str:
    return operation.inputs[place] if place < len(operation.inputs) else ""


def _type_name(constant: Any) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(constant.data_type)).lower()


def _any_nonzero(constant: Any) -> bool:
    """False for one whose values lie outside the file."""
    if constant is None or constant.external_data:
        return False
    from onnx import numpy_helper

    return bool(numpy_helper.to_array(constant).any())
