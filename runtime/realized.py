"""The receipt: which layers ONNX Runtime really runs in integers.

A QDQ graph that loads is not one that runs in integers: where a pattern is missed, the runtime
dequantizes and computes in floating point without a word. So the optimized graph is written out
and read back, and each layer asked for is looked up in it.

A layer ``L`` is found by the name of its node, ``node_L``, with what graph optimizers append to it
(``_token_3``, ``_nchwc``, ``/MatMulAddFusion``) or what our passes append (``.part_0``); failing that by
its weight, ``L.weight*``. The runtime renames scales it finds equal, so those identify nothing.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tfmq_export.bundle import Bundle, LayerInfo
from tfmq_export.errors import DependencyError, PrecisionError
from tfmq_export.runtime.ort_runner import OrtRunner

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
FLOAT_OPS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"})

_LAYOUT_OPS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "ReorderInput"})
_SUFFIX = re.compile(r"(_token_\d+|_nchwc|[./][^./]*)$")


@dataclass(frozen=True, slots=True)
class Operation:
    """One node of the optimized graph."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerReceipt:
    """One layer: asked against realized.

    Attributes:
        realized: Kinds of operation that compute it; empty where none was found.
        reason: Why it is not what was asked; empty where it is.
    """

    layer: LayerInfo
    realized: tuple[str, ...]
    reason: str

    @property
    def asked(self) -> str:
        """Such as "W4A8"; "float" where nothing is quantized."""
        weight = f"W{self.layer.weight_bits}" if self.layer.weight_bits else ""
        return weight + (f"A{self.layer.activation_bits}" if self.layer.activation_bits else "") or "float"

    @property
    def integer(self) -> bool:
        return bool(self.realized) and INTEGER_OPS.issuperset(self.realized)

    @property
    def emulated(self) -> str:
        """Widths below 8 bits that 8-bit kernels carry; empty where there are none."""
        widths = {"weights": self.layer.weight_bits, "activations": self.layer.activation_bits}
        narrow = [f"{bits}-bit {what}" for what, bits in widths.items() if 0 < bits < 8]
        return f"{' and '.join(narrow)} on 8-bit kernels" if self.integer and narrow else ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a runtime made of a graph.

    Attributes:
        strays: Operations of no layer asked for that compute on dequantized numbers, with the reason.
        macs: Multiply-accumulates of the whole model for one sample.
    """

    rows: tuple[LayerReceipt, ...]
    strays: tuple[tuple[str, str], ...]
    macs: int

    @property
    def lost(self) -> tuple[LayerReceipt, ...]:
        """Layers that are not what was asked."""
        return tuple(row for row in self.rows if row.reason)

    @property
    def integer_share(self) -> float:
        """Share of the model's multiply-accumulates that run in integers."""
        return sum(row.layer.macs for row in self.rows if row.integer) / self.macs if self.macs else 0.0

    def counts(self, kind: str) -> tuple[int, int]:
        """Layers of a kind ("conv", "linear") that run in integers, and those asked to."""
        rows = [row for row in self.rows if row.layer.kind == kind and row.layer.activation_bits]
        return sum(row.integer for row in rows), len(rows)

    def raise_if_lost(self) -> None:
        """Raise PrecisionError naming the first losses."""
        losses = [(row.layer.path, row.reason) for row in self.lost] + list(self.strays)
        if losses:
            shown = "; ".join(f"{where}: {reason}" for where, reason in losses[:3])
            more = f"; and {len(losses) - 3} more" if len(losses) > 3 else ""
            raise PrecisionError(
                f"{len(losses)} of {len(self.rows)} layers are not what was asked: {shown}{more}; "
                "keep them in float, or see the graph of each pass with --dump-dir"
            )

    def to_json(self) -> dict[str, object]:
        """Plain data for ``json.dumps``."""
        return {
            "integer_share": self.integer_share,
            "convs": self.counts("conv"),
            "linears": self.counts("linear"),
            "layers": [
                {
                    "name": row.layer.name,
                    "path": row.layer.path,
                    "asked": row.asked,
                    "realized": list(row.realized),
                    "emulated": row.emulated,
                    "lost": row.reason,
                }
                for row in self.rows
            ],
            "strays": [{"name": name, "lost": reason} for name, reason in self.strays],
        }


def realized_on_ort(
    model: Path | Bundle, requested: Sequence[LayerInfo], *, work_dir: Path | None = None, macs: int | None = None
) -> Receipt:
    """Load a graph as ONNX Runtime's CPU provider would run it and look up every layer in it.

    Of a bundle with a prologue, each layer is looked up in the graph it lies in.

    Args:
        requested: The layers and the precision asked for.
        work_dir: Where a temporary copy of the model may lie; the system's own place if None.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    total = sum(layer.macs for layer in requested) if macs is None else macs
    path = model.model if isinstance(model, Bundle) else model
    info = model.manifest.prologue if isinstance(model, Bundle) else None
    if not isinstance(model, Bundle) or info is None or model.prologue is None:
        return receipt_of(optimized_operations(path, work_dir), requested, total)
    moved = [layer for layer in requested if layer.name in info.layers]
    stayed = [layer for layer in requested if layer.name not in info.layers]
    once = receipt_of(optimized_operations(model.prologue, work_dir), moved, total)
    each = receipt_of(optimized_operations(path, work_dir), stayed, total)
    rows = {row.layer.name: row for row in (*once.rows, *each.rows)}
    return Receipt(tuple(rows[layer.name] for layer in requested), once.strays + each.strays, total)


def optimized_operations(model_path: Path, work_dir: Path | None = None) -> tuple[Operation, ...]:
    """The graph that ONNX Runtime runs, node by node."""
    try:
        import onnx
    except ImportError as error:
        raise DependencyError("onnx is not installed; pip install onnx") from error
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        path = Path(folder) / "optimized.onnx"
        with OrtRunner(model_path, threads=1, optimized_to=path):
            graph = onnx.load(path, load_external_data=False).graph
    return tuple(Operation(node.op_type, node.name, tuple(node.input), tuple(node.output)) for node in graph.node)


def receipt_of(operations: Sequence[Operation], requested: Sequence[LayerInfo], macs: int) -> Receipt:
    """Compare what was asked with an optimized graph."""
    producers = {value: operation for operation in operations for value in operation.outputs}
    consumers: dict[str, list[Operation]] = {}
    for operation in operations:
        for value in operation.inputs:
            consumers.setdefault(value, []).append(operation)

    found: dict[str, list[Operation]] = {layer.name: [] for layer in requested}
    strays = []
    for operation in operations:
        if operation.op not in INTEGER_OPS | FLOAT_OPS:
            continue
        name = _layer_of(operation, found, producers)
        if name is not None:
            found[name].append(operation)
        elif operation.op in FLOAT_OPS and all(_is_dequantized(value, producers) for value in operation.inputs[:2]):
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


def _layer_of(operation: Operation, layers: Mapping[str, object], producers: Mapping[str, Operation]) -> str | None:
    """The layer an operation computes, by its own name, else by its weight's."""
    stem: str | None = operation.name.removeprefix("node_")
    while stem:
        if stem in layers:
            return stem
        shorter = _SUFFIX.sub("", stem)
        stem = shorter if shorter != stem else None
    for value in operation.inputs:
        while True:
            layer, found, _ = value.rpartition(".weight")
            if found and layer in layers:
                return layer
            producer = producers.get(value)
            if producer is None or producer.op not in _LAYOUT_OPS | {"DequantizeLinear"}:
                break
            value = producer.inputs[0]
    return None


def _loss(
    layer: LayerInfo,
    operations: Sequence[Operation],
    producers: Mapping[str, Operation],
    consumers: Mapping[str, Sequence[Operation]],
) -> str:
    """Why a layer is not what was asked; empty where it is."""
    in_float = [operation for operation in operations if operation.op in FLOAT_OPS]
    if not layer.activation_bits:
        integer = [operation.op for operation in operations if operation.op in INTEGER_OPS]
        return f"asked to stay float, runs as {integer[0]}" if integer else ""
    if not operations:
        return f"no operation node_{layer.name} in the optimized graph; was it renamed or folded?"
    if not in_float:
        return ""
    (operation, *_) = in_float
    return f"runs as {operation.op} in float: {_why_float(operation, producers, consumers)}"


def _why_float(
    operation: Operation, producers: Mapping[str, Operation], consumers: Mapping[str, Sequence[Operation]]
) -> str:
    if operation.op == "MatMulNBits":
        return "the weight's 4-bit codes reach DequantizeLinear without a Cast to int8"
    if not _is_dequantized(operation.inputs[0], producers):
        return "its input is not quantized"
    if not _is_dequantized(operation.inputs[1], producers):
        return "its weight is not quantized"
    if operation.name.endswith("/MatMulAddFusion"):
        return "its MatMul and 1-D bias were fused; give the bias the shape [1, 1, N]"
    after = [consumer.op for value in operation.outputs for consumer in consumers.get(value, ())]
    if operation.op == "FusedConv" or "QuantizeLinear" not in after:
        return "no QuantizeLinear follows it"
    if len(after) > 1:
        return "its output is used in float beside the QuantizeLinear"
    return "unknown; check that the bias scale is input scale x weight scale, and the types uint8 x int8"


def _is_dequantized(value: str, producers: Mapping[str, Operation]) -> bool:
    """Whether a value comes out of a DequantizeLinear, changed in layout at most."""
    producer = producers.get(value)
    while producer is not None and producer.op in _LAYOUT_OPS:
        producer = producers.get(producer.inputs[0])
    return producer is not None and producer.op == "DequantizeLinear"
