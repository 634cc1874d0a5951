"""The receipt of the NPU: the provider's own trace says what each node became, its graph which types that computes in.

Both are written when a graph is compiled. A layer is on the NPU in integers where the operation that its node became
reads integers and writes them; where the provider took it as a real number, the graph says so.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.recipe.names import layer_named, node_name
from tfmq_export.runtime.engines.qnn.library import USUAL_CHIP, library
from tfmq_export.runtime.engines.qnn.session import SessionRequest, nodes_left, open_session
from tfmq_export.runtime.graph_file import read_model
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt, total_macs

TRACE = "qnn_op_trace.json"
PRODUCTS = frozenset({"Conv2d", "Conv3d", "DepthWiseConv2d", "TransposeConv2d", "FullyConnected", "MatMul"})
TYPES = {776: "int8", 790: "int16", 818: "int32", 1032: "uint8", 1046: "uint16", 534: "float16", 562: "float32"}
"""Element types that numbers lie in, by QNN's own codes (``Qnn_DataType_t``); others are indices and truth values."""
FLOATS = frozenset({"float16", "float32"})
CONVERSIONS = frozenset({"Quantize", "Dequantize"})


@dataclass(frozen=True, slots=True)
class NpuOperation:
    """One operation of the compiled graph.

    Attributes:
        kind: Such as "Conv2d".
        reads: Types of its operands.
        writes: Of its results.
        nodes: Of the graph that was compiled, which it was made of.
    """

    kind: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def described(self) -> str:
        """Such as "Conv2d uint8 x int8 -> uint8"."""
        return f"{self.kind} {' x '.join(self.reads[:2])} -> {self.writes[0] if self.writes else 'nothing'}"

    @property
    def in_float(self) -> bool:
        return bool(FLOATS & {*self.reads, *self.writes})


@dataclass(frozen=True, slots=True)
class Account:
    """What the provider says of a graph.

    Attributes:
        left: Nodes that it leaves to the CPU, each with its kind and the reason.
    """

    operations: tuple[NpuOperation, ...]
    left: tuple[tuple[str, str, str], ...]


def realized_on_qnn(
    model: Path | Bundle, requested: Sequence[LayerInfo], *, macs: int | None = None, chip: str = USUAL_CHIP
) -> Receipt:
    """Compile a graph for one sample, and look up every layer in what the provider made of it.

    Args:
        requested: The layers and the precision asked for.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
        chip: A name in ``CHIPS``.
    Raises:
        DependencyError: onnxruntime-qnn is not installed.
        BuildError: it refuses the graph.
    """
    path = model.model if isinstance(model, Bundle) else model
    return receipt_of(account_of(path, chip=chip), requested, total_macs(requested, macs))


def account_of(path: Path, *, chip: str = USUAL_CHIP, batch: int = 1) -> Account:
    """Compile a graph and read what the provider says.

    Args:
        batch: Size of every dimension that the graph leaves open.
    """
    inputs = read_model(path).graph.input
    names = {x.dim_param for value in inputs for x in value.type.tensor_type.shape.dim if x.dim_param}
    with tempfile.TemporaryDirectory() as folder:
        # Nodes on the CPU are allowed here: the account is to name them all, not the first.
        request = SessionRequest(dict.fromkeys(names, batch), chip, trace=Path(folder), strict=False)
        return account_in(Path(folder), open_session(library(), path, request))


def account_in(folder: Path, session: Any) -> Account:
    """What a session says that wrote its trace into a folder."""
    return read_account(folder, nodes_left(session))


def read_account(folder: Path, left: Iterable[tuple[str, str]]) -> Account:
    """The trace and the graphs in a folder.

    Args:
        left: Name and kind of the nodes on the CPU, as ONNX Runtime says.
    """
    trace = json.loads((folder / TRACE).read_text("utf-8")) if (folder / TRACE).exists() else {}
    nodes: dict[str, list[str]] = {}
    for part in trace.get("subgraph_traces", ()):
        for mapping in part["op_mappings"]:
            names = [source["name"] for source in mapping["sources"] if source["type"] == "OP"]
            nodes.setdefault(mapping["dst_name"], []).extend(names)
    reasons = {each["node_name"]: each["reason"] for each in trace.get("unsupported_nodes", ())}
    operations = []
    for path in sorted(folder.glob("*.json")):
        graph = json.loads(path.read_text("utf-8")).get("graph") if path.name != TRACE else None
        if graph is not None:
            operations += [_operation(name, node, graph["tensors"], nodes) for name, node in graph["nodes"].items()]
    return Account(tuple(operations), tuple((name, op, reasons.get(name, "")) for name, op in left))


def _operation(
    name: str, node: Mapping[str, Any], tensors: Mapping[str, Any], nodes: Mapping[str, Sequence[str]]
) -> NpuOperation:
    reads, writes = (
        tuple(TYPES[kind] for kind in (tensors[value]["data_type"] for value in node[key]) if kind in TYPES)
        for key in ("input_names", "output_names")
    )
    return NpuOperation(str(node["type"]), name, reads, writes, tuple(nodes.get(name, (name,))))


def receipt_of(account: Account, requested: Sequence[LayerInfo], macs: int) -> Receipt:
    """Compare what was asked with the provider's account."""
    names = {layer.name for layer in requested}
    found: dict[str, list[NpuOperation]] = {name: [] for name in names}
    strays = [(name or op, f"{op} runs on the CPU: {reason or 'no reason given'}") for name, op, reason in account.left]
    for operation in account.operations:
        owner = _owner(operation, names) if operation.kind in PRODUCTS else None
        if owner is not None:
            found[owner].append(operation)
        elif operation.in_float and not _at_the_ends(operation):
            strays.append((operation.name, f"runs as {operation.described}, in floating point"))
    lost_to_cpu = {layer: reason for name, _, reason in account.left if (layer := layer_named(name, names))}
    rows = [
        LayerReceipt(
            layer,
            tuple(sorted({operation.described for operation in found[layer.name]})),
            _loss(layer, found[layer.name], lost_to_cpu),
        )
        for layer in requested
    ]
    return Receipt(tuple(rows), tuple(strays), macs)


def _owner(operation: NpuOperation, names: set[str]) -> str | None:
    for node in (operation.name, *operation.nodes):
        if (named := layer_named(node, names)) is not None:
            return named
    return None


def _at_the_ends(operation: NpuOperation) -> bool:
    """Whether an operation turns the graph's real input into integers, or integers into its real output."""
    return operation.kind in CONVERSIONS


def _loss(layer: LayerInfo, found: Sequence[NpuOperation], on_cpu: Mapping[str, str]) -> str:
    """Why a layer is not what was asked; empty where it is."""
    if not layer.activation_bits:
        return ""  # nothing computes in floating point here: what is asked to may be more exact, and is told in kinds
    if not found and layer.name in on_cpu:
        return f"runs on the CPU: {on_cpu[layer.name] or 'the provider gives no reason'}"
    if not found:
        return f"no operation {node_name(layer.name)} in the compiled graph; was it renamed or folded?"
    for operation in found:
        if operation.in_float:
            return f"runs as {operation.described}, in floating point"
    return ""
