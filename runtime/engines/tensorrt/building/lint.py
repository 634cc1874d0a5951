"""The rules of TensorRT for Q/DQ graphs, checked on the graph alone: no TensorRT, no GPU, no build.

Most of what breaks them is silent: the parser takes the graph, and the layer runs in floating point. Each rule was
seen to be one with TensorRT-RTX 1.7 (docs/tensorrt.md); what the lint finds nothing in may still be lost, which is for
the receipt of a real build to say.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from tfmq_export.errors import TargetError
from tfmq_export.runtime.engines.tensorrt.building.qdq_view import FLOATS, QdqView, attribute, name_of
from tfmq_export.runtime.engines.tensorrt.building.quantized_operands import (
    LAYERS,
    Operand,
    operands_of,
    reads_channels_of,
)
from tfmq_export.runtime.graph_file import read_model

OPSETS = range(19, 24)
_UNSIGNED = frozenset({TensorProto.UINT4, TensorProto.UINT8, TensorProto.UINT16})
_STORAGE = frozenset({TensorProto.INT4, TensorProto.INT8, TensorProto.UINT4, TensorProto.UINT8})
_SAME_TYPE = LAYERS | {"Add", "Sub", "Mul", "Div", "Concat"}
_REFUSED = {
    **dict.fromkeys(
        ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"),
        "write it as QuantizeLinear -> DequantizeLinear -> the layer",
    ),
    **dict.fromkeys(("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"), "multiply by a power of two instead"),
    **dict.fromkeys(("If", "Loop", "Scan"), "look the values up in a table with Gather; layers inside run in float"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that breaks a rule.

    Attributes:
        node: Node or graph input.
        rule: Which rule, in a word or two.
        problem: What is wrong there.
        remedy: What to do.
        layers: The quantized layers that it costs; empty where it concerns the whole graph.
    """

    node: str
    rule: str
    problem: str
    remedy: str
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}; {self.remedy}"


def lint_model(
    model: onnx.ModelProto, *, folder: Path | None = None, profiled: Collection[str] = ()
) -> tuple[Finding, ...]:
    """Every place where a graph breaks a rule.

    Args:
        folder: Where the external data lies; needed if scales are in it.
        profiled: Inputs whose shapes the build's profile gives. A batch that varies needs none.
    """
    view = QdqView(model, folder)
    operands = [operand for node in view.nodes if node.op_type in LAYERS for operand in operands_of(view, node)]
    readers: dict[str, tuple[str, ...]] = {}
    for operand in operands:
        for grid in operand.grids:
            readers[grid.output[0]] = (*readers.get(grid.output[0], ()), name_of(operand.layer))
    grids = [node for node in view.nodes if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    return (
        *_opset(model),
        *_dynamic_sizes(model, profiled),
        *(finding for node in view.nodes for finding in _operator(view, node)),
        *(finding for node in view.nodes for finding in _mixed_types(view, node)),
        *(finding for node in grids for finding in _grid(view, node, readers.get(node.output[0], ()))),
        *(finding for operand in operands for finding in _operand(view, operand)),
    )


def lint_file(path: Path, *, profiled: Collection[str] = ()) -> tuple[Finding, ...]:
    """``lint_model`` of a file; weights stay on disk."""
    return lint_model(read_model(path), folder=path.parent, profiled=profiled)


def raise_if_any(findings: Sequence[Finding], target: str) -> None:
    """Raise TargetError naming the first findings."""
    if findings:
        more = f"; and {len(findings) - 3} more" if len(findings) > 3 else ""
        raise TargetError(f"{target}: {'; '.join(str(finding) for finding in findings[:3])}{more}")


def _opset(model: onnx.ModelProto) -> Iterator[Finding]:
    for imported in model.opset_import:
        if imported.domain in {"", "ai.onnx"} and imported.version not in OPSETS:
            yield Finding(
                "graph",
                "opset",
                f"opset {imported.version} is outside {OPSETS.start} to {OPSETS.stop - 1}",
                "export with opset 23",
            )


def _dynamic_sizes(model: onnx.ModelProto, profiled: Collection[str]) -> Iterator[Finding]:
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim[1:]
        varies = any(not size.HasField("dim_value") for size in sizes)
        if varies and value.name not in constants and value.name not in profiled:
            yield Finding(
                value.name,
                "dynamic size",
                "more than its batch may vary and no profile names it",
                "give its smallest, usual and largest shape",
            )


def _operator(view: QdqView, node: NodeProto) -> Iterator[Finding]:
    def found(rule: str, problem: str, remedy: str) -> Finding:
        return Finding(name_of(node), rule, problem, remedy)

    types = [view.element_type(value) for value in node.input if value]
    if node.domain not in {"", "ai.onnx"}:
        yield found("operator", f"{node.domain} {node.op_type} belongs to another engine", "lower it to ONNX operators")
    elif node.op_type in _REFUSED:
        yield found("operator", f"TensorRT does not run {node.op_type} in integers", _REFUSED[node.op_type])
    elif node.op_type in {"Mul", "Add", "Sub", "Div"} and _STORAGE.intersection(types):
        yield found(
            "integer arithmetic", f"{node.op_type} on 8-bit integers is refused", "fold it, or compute in float"
        )
    elif node.op_type == "Gather" and types[0] in _STORAGE and view.is_constant(node.input[0]):
        yield found("integer arithmetic", "Gather from integer constants is refused", "keep the table in float")
    elif node.op_type == "Cast" and _STORAGE.intersection(types) & {TensorProto.INT4, TensorProto.UINT4}:
        yield found("4-bit codes", "Cast of 4-bit integers is refused", "store the codes as int8")
    elif node.op_type == "Attention" and types[0] == TensorProto.FLOAT:
        yield found("operator", "Attention has no float32 kernel", "lower it to MatMul and Softmax, or use float16")


def _mixed_types(view: QdqView, node: NodeProto) -> Iterator[Finding]:
    if node.op_type not in _SAME_TYPE:
        return
    types = {view.element_type(value) for value in node.input if value} & FLOATS
    if len(types) > 1:
        names = " and ".join(sorted(TensorProto.DataType.Name(each).lower() for each in types))
        layers = (name_of(node),) if node.op_type in LAYERS else ()
        yield Finding(name_of(node), "mixed types", f"its operands are {names}", "Cast them to one type", layers)


def _grid(view: QdqView, node: NodeProto, layers: tuple[str, ...]) -> Iterator[Finding]:
    """Rules of one QuantizeLinear or DequantizeLinear, whatever reads it."""

    def found(rule: str, problem: str, remedy: str) -> Finding:
        return Finding(name_of(node), rule, problem, remedy, layers)

    codes = view.element_type(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0])
    zero_point = node.input[2] if len(node.input) > 2 else ""
    typed = bool(zero_point) or attribute(node, "output_dtype", 0) != 0
    if codes == TensorProto.INT32:
        yield found("int32 bias", "int32 codes are refused", "keep biases in float")
    elif node.op_type == "QuantizeLinear" and not typed:
        yield found("unsigned", "codes without a zero point are uint8 in ONNX", "give it an int8 zero point of 0")
    elif codes in _UNSIGNED:
        yield found("unsigned", "unsigned codes are read as signed; large ones saturate", "use int8")
    if zero_point:
        zeros = view.constant(zero_point)
        if zeros is None or np.any(zeros.astype(np.float32) != 0):
            yield found("zero point", "its zero point is not 0", "quantize x + offset on a symmetric grid")

    scale = view.constant(node.input[1])
    if scale is None:
        yield found("computed scale", "its scale is computed, which crashes the builder", "multiply in front of it")
        return
    if not (np.isfinite(scale).all() and np.all(scale > 0)):  # type: ignore[operator]  # scales are real
        yield found("scale value", f"its scale is not above 0 in {scale.dtype}", "keep scales in float32")
    sizes = view.shape(node.input[0]) or ()
    axis = attribute(node, "axis", 1)
    per_channel_of_one = -len(sizes) <= axis < len(sizes) and sizes[axis] == 1
    if scale.shape == (1,) and not per_channel_of_one:
        yield found("scale shape", "a scale of shape [1] loses int8", "make it a scalar of rank 0")


def _operand(view: QdqView, operand: Operand) -> Iterator[Finding]:
    """Rules of what lies between a grid and the layer that reads it."""
    layer = operand.layer
    name = name_of(layer)

    def found(node: NodeProto, rule: str, problem: str, remedy: str) -> Finding:
        return Finding(name_of(node), rule, problem, remedy, (name,))

    if layer.op_type == "ConvTranspose" and operand.index == 1 and operand.dequantize is not None:
        yield found(layer, "operator", "ConvTranspose never runs in int8", "keep it in float")
        return
    if operand.blocker is not None:
        yield found(
            operand.blocker,
            "op behind grid",
            f"{operand.blocker.op_type} stands between DequantizeLinear and {name}",
            "move it in front of QuantizeLinear, or quantize again behind it",
        )
    if operand.dequantize is None:
        return
    if len({_scale_bytes(view, grid) for grid in operand.dequantized}) > 1:
        yield found(layer, "unequal grids", "the parts of its Concat have different scales", "quantize behind Concat")
    grid = operand.dequantize
    scale = view.shape(grid.input[1]) or ()
    if operand.is_weight:
        if view.element_type(grid.input[0]) in {TensorProto.INT4, TensorProto.UINT4} and layer.op_type == "Conv":
            yield found(grid, "4-bit codes", "convolutions read no 4-bit codes", "store the codes as int8")
        if len(scale) == 1 and scale != (1,) and not reads_channels_of(view, operand):
            yield found(grid, "channel axis", f"its axis is not the output channel of {name}", "scale output channels")
    elif len(scale) == 1 and scale != (1,) and (layer.op_type == "Conv" or reads_channels_of(view, operand)):
        yield found(
            grid, "per-channel input", "activations have a scale per channel", "Mul by factors in front of one scale"
        )


def _scale_bytes(view: QdqView, grid: NodeProto) -> bytes:
    scale = view.constant(grid.input[1])
    return b"" if scale is None else np.asarray(scale, np.float64).tobytes()
