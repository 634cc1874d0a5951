"""The receipt of ONNX Runtime: the optimized graph is written out, read back, and each layer looked up in it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.recipe.names import node_name
from tfmq_export.runtime.engines.onnxruntime.onnx_nodes import read_nodes
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.measure.operations import LAYOUT_OPS, Operation, dequantizer, layer_of, producers_of
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt, total_macs

INTEGER_OPS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
    }
)
FACTORS = {"MatMulIntegerToFloat": (0, 1), "MatMulInteger": (0, 1)}
"""Where an integer product with a float or exact result has its codes."""

FLOAT_OPS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"})


def realized_on_ort(
    model: Path | Bundle, requested: Sequence[LayerInfo], *, work_dir: Path | None = None, macs: int | None = None
) -> Receipt:
    """Load a graph as ONNX Runtime's CPU provider would run it and look up every layer in it.

    Args:
        requested: The layers and the precision asked for.
        work_dir: Where a temporary copy of the model may lie; the system's own place if None.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    path = model.model if isinstance(model, Bundle) else model
    return receipt_of(optimized_operations(path, work_dir), requested, total_macs(requested, macs))


def optimized_operations(model_path: Path, work_dir: Path | None = None) -> tuple[Operation, ...]:
    """The graph that ONNX Runtime runs, node by node."""
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        path = Path(folder) / "optimized.onnx"
        with OrtRunner(model_path, threads=1, optimized_to=path):
            return read_nodes(path)


def receipt_of(operations: Sequence[Operation], requested: Sequence[LayerInfo], macs: int) -> Receipt:
    """Compare what was asked with an optimized graph."""
    producers = producers_of(operations)
    consumers: dict[str, list[Operation]] = {}
    for operation in operations:
        for value in operation.inputs:
            consumers.setdefault(value, []).append(operation)

    found: dict[str, list[Operation]] = {layer.name: [] for layer in requested}
    strays = []
    for operation in operations:
        if operation.op not in INTEGER_OPS | FLOAT_OPS:
            continue
        name = layer_of(operation, found, producers)
        if name is not None:
            found[name].append(operation)
        elif operation.op in FLOAT_OPS and all(dequantizer(value, producers) for value in operation.inputs[:2]):
            strays.append((operation.name or operation.op, f"runs as {operation.op} on dequantized operands"))
    rows = [
        LayerReceipt(
            layer,
            tuple(sorted({operation.op for operation in found[layer.name]})),
            _loss(layer, found[layer.name], producers, consumers),
        )
        for layer in requested
    ]
    return Receipt(tuple(rows), tuple(strays), macs)


def _loss(
    layer: LayerInfo,
    operations: Sequence[Operation],
    producers: Mapping[str, Operation],
    consumers: Mapping[str, Sequence[Operation]],
) -> str:
    """Why a layer is not what was asked; empty where it is."""
    in_float = [operation for operation in operations if operation.op in FLOAT_OPS]
    if not layer.activation_bits:
        integer = [
            operation.op
            for operation in operations
            if operation.op in INTEGER_OPS and not _multiplies_given_codes(operation, producers)
        ]
        return f"asked to stay float, runs as {integer[0]}" if integer else ""
    if not operations:
        return f"no operation {node_name(layer.name)} in the optimized graph; was it renamed or folded?"
    if not in_float:
        return ""
    (operation, *_) = in_float
    return f"runs as {operation.op} in float: {_why_float(operation, producers, consumers)}"


def _multiplies_given_codes(operation: Operation, producers: Mapping[str, Operation]) -> bool:
    """Whether an integer product is the float one that was asked for: nothing was rounded to make it.

    Both factors are results of quantized layers (q and k of convolutions), which are there as codes, and ONNX Runtime
    multiplies these in place of what they stand for. The result stays float.
    """
    places = FACTORS.get(operation.op, ())
    return bool(places) and all(_is_result(operation.inputs[place], producers) for place in places)


def _is_result(codes: str, producers: Mapping[str, Operation]) -> bool:
    """Whether codes are what a quantized layer returned, changed in layout at most."""
    producer = producers.get(codes)
    while producer is not None and producer.op in LAYOUT_OPS:
        producer = producers.get(producer.inputs[0])
    return producer is not None and producer.op in INTEGER_OPS


def _why_float(
    operation: Operation, producers: Mapping[str, Operation], consumers: Mapping[str, Sequence[Operation]]
) -> str:
    if operation.op == "MatMulNBits":
        return "the weight's 4-bit codes reach DequantizeLinear without a Cast to int8"
    if not dequantizer(operation.inputs[0], producers):
        return "its input is not quantized"
    if not dequantizer(operation.inputs[1], producers):
        return "its weight or second factor is not quantized"
    if operation.name.endswith("/MatMulAddFusion"):
        return "its MatMul and 1-D bias were fused; give the bias the shape [1, 1, N]"
    after = [consumer.op for value in operation.outputs for consumer in consumers.get(value, ())]
    if operation.op == "FusedConv" or "QuantizeLinear" not in after:
        return "no QuantizeLinear follows it"
    if len(after) > 1:
        return "its output is used in float beside the QuantizeLinear"
    return "unknown; check that the bias scale is input scale x weight scale, and the types uint8 x int8"
