"""The receipt of OpenVINO: its runtime model names, for every operation, the nodes it was made of and its kernel.

Whether a layer computes in integers is the kernel's type (``brgconv_avx512_I8``). The precision OpenVINO reports
beside it is no proof: a MatMul on packed 4-bit weights says "i4" and multiplies in f32. The runtime model does not
say why a layer was lost, so the reason is looked up in the graph OpenVINO was given.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle import Bundle, LayerInfo
from tfmq_export.runtime.openvino_runner import OpenVinoRunner, RuntimeOperation
from tfmq_export.runtime.operations import (
    Operation,
    dequantizer,
    layer_named,
    layer_of,
    layer_weighted,
    operations_of,
    producers_of,
    read_graph,
)
from tfmq_export.runtime.receipt import LayerReceipt, Receipt, total_macs

PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul", "Deconvolution"})

_SOURCE_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
_INTEGER = re.compile(r"_[iu]8$", re.IGNORECASE)

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
        constants: Stored tensors by name, as the file has them.
    """

    operations: tuple[Operation, ...]
    constants: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Source":
        graph = read_graph(path)
        return cls(operations_of(graph), {value.name: value for value in graph.initializer})


def receipt_of(
    operations: Sequence[RuntimeOperation], source: Source, requested: Sequence[LayerInfo], macs: int
) -> Receipt:
    """Compare what was asked with a runtime model."""
    names = {layer.name for layer in requested}
    given = producers_of(source.operations)
    asked_of: dict[str, Operation] = {}
    foreign: dict[str, Operation] = {}
    for operation in source.operations:
        if operation.op in _SOURCE_PRODUCTS:
            layer = layer_of(operation, names, given)
            if layer is not None:
                asked_of.setdefault(layer, operation)
            else:
                foreign[operation.name] = operation

    runtime = producers_of(Operation(item.kind, item.name, item.inputs, (item.name,)) for item in operations)
    found: dict[str, list[RuntimeOperation]] = {name: [] for name in names}
    strays = []
    for item in operations:
        if item.kind not in PRODUCTS:
            continue
        layers = _layers_of(item, names, runtime)
        for layer in layers:
            found[layer].append(item)
        if layers or _INTEGER.search(item.kernel):
            continue
        for origin in foreign.keys() & {name.partition("/")[0] for name in item.origins}:
            if all(dequantizer(value, given) for value in foreign[origin].inputs[:2]):
                strays.append((origin, f"runs as {item.kind} ({item.kernel}) on dequantized operands"))
    rows = [
        LayerReceipt(
            layer,
            tuple(sorted({f"{item.kind} {item.kernel}" for item in found[layer.name]})),
            _loss(layer, found[layer.name], asked_of.get(layer.name), source, given),
        )
        for layer in requested
    ]
    return Receipt(tuple(rows), tuple(strays), macs)


def _layers_of(item: RuntimeOperation, layers: Collection[str], runtime: Mapping[str, Operation]) -> set[str]:
    """Usually one; OpenVINO fuses some convolutions with the one in front of them."""
    named = {layer_named(name, layers) for name in item.origins if name.startswith("node_")} - {None}
    if not named:
        named = {layer_weighted(runtime[item.name], layers, runtime)} - {None}
    return {layer for layer in named if layer is not None}


def _loss(
    layer: LayerInfo,
    found: Sequence[RuntimeOperation],
    given: Operation | None,
    source: Source,
    producers: Mapping[str, Operation],
) -> str:
    """Why a layer is not what was asked; empty where it is."""
    if not layer.activation_bits:
        integer = [item for item in found if _INTEGER.search(item.kernel)]
        return f"asked to stay float, runs as {integer[0].kind} ({integer[0].kernel})" if integer else ""
    if not found:
        return f"no operation node_{layer.name} in OpenVINO's runtime model; was it renamed or folded?"
    in_float = [item for item in found if not _INTEGER.search(item.kernel)]
    if not in_float:
        return ""
    (item, *_) = in_float
    why = "its node is not in the graph" if given is None else _why_float(given, source, producers)
    return f"runs as {item.kind} ({item.kernel}) in float: {why}"


def _why_float(given: Operation, source: Source, producers: Mapping[str, Operation]) -> str:
    x, weight = (dequantizer(value, producers) for value in given.inputs[:2])
    if x is None:
        return "its input does not come straight from DequantizeLinear"
    if weight is None:
        return "its weight is not quantized"
    codes = source.constants.get(weight.inputs[0])
    if codes is not None and codes.data_type != _INT8:
        return f"its weight is stored as {_type_name(codes)}; store int8 codes, or packed ones behind a Cast to int8"
    if _any_nonzero(source.constants.get(_input(weight, 2))):
        return "its weight has a zero point that is not 0"
    scale, zero_point = (source.constants.get(_input(x, place)) for place in (1, 2))
    if scale is not None and any(size > 1 for size in scale.dims):
        return "its input has a scale for each channel; put the factors in a Mul in front of QuantizeLinear"
    if zero_point is not None and zero_point.data_type not in (_INT8, _UINT8):
        return f"its input is quantized to {_type_name(zero_point)}, which has no kernel"
    return "unknown; compile the graph again, and report the pattern if that does not help"


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
