"""What can be read off a captured graph.

Which operations can be quantized, which values depend on the timestep alone, how much each operation
costs: all of it follows from data dependences, never from module names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.macs import EINSUM, PRODUCTS, is_transposed, macs_of
from tfmq_export.capture.rows import batch_axis, mixed_rows, rows_per_sample
from tfmq_export.errors import ExportError

aten = torch.ops.aten

SAMPLE, TIMESTEP, CONDITIONING = "sample", "timestep", "conditioning"

KINDS: Mapping[object, str] = {
    aten.conv1d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.default: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.default: "conv",
    aten.conv3d.padding: "conv",
    aten.convolution.default: "conv",
    aten.linear.default: "linear",
}

# A shape query reads no data: a timestep expanded to the batch of the sample still depends on t only.
SHAPE_QUERIES = frozenset(
    {aten.sym_size.int, aten.sym_numel.default, aten.ones_like.default, aten.zeros_like.default}
    | {aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
)
# Only the first argument's data matters; the second lends its shape or type.
SHAPED_LIKE = frozenset({aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default})
# Operations that move numbers without changing them. A temporal table is taken in front of them.
LAYOUT = frozenset(
    {aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.slice.Tensor}
    | {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.select.int}
    | {aten.expand.default, aten.permute.default, aten.transpose.int, aten.contiguous.default, aten.dropout.default}
    | {aten.to.dtype, aten._to_copy.default, aten.flatten.using_ints, aten.clone.default, aten.alias.default}
    | {aten.expand_as.default, aten.squeeze.dims, aten.squeeze.default}
)


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A convolution or linear layer of the graph.

    Attributes:
        name: Its value in the graph.
        path: Module path that issued it.
        kind: "conv" or "linear".
        input: Name of the value it reads.
        weight: Name of its weight's node.
        bias: Name of its bias's node, or None.
        macs: Multiply-accumulates for one sample.
        roles: What its result depends on.
        groups: Of a convolution.
        batch_axis: Of the value it reads; the samples of a batch may lie behind the tokens.
    """

    name: str
    path: str
    kind: str
    input: str
    weight: str
    bias: str | None
    macs: int
    roles: frozenset[str]
    groups: int = 1
    batch_axis: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TemporalFeature:
    """A value on the frontier of the temporal block (TFMQ-DM, section 3.1).

    Attributes:
        per_sample: Whether its first axis is the batch.
        rows: Of its first axis that each sample has: the frames of a video, where time is repeated for each.
    """

    name: str
    path: str
    per_sample: bool
    rows: int = 1


def dependences(graph: fx.Graph, roles: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The roles of the inputs whose data each value depends on; empty for weights."""
    depends: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            depends[node.name] = frozenset({roles[node.name]}) if node.name in roles else frozenset()
        elif node.target in SHAPE_QUERIES:
            depends[node.name] = frozenset()
        else:
            sources = node.all_input_nodes[:1] if node.target in SHAPED_LIKE else node.all_input_nodes
            depends[node.name] = frozenset().union(*(depends[source.name] for source in sources))
    return depends


def find_operations(graph: fx.Graph, depends: Mapping[str, frozenset[str]]) -> list[Operation]:
    """Every operation that multiplies by a weight, in forward order.

    Args:
        depends: From ``dependences``.
    """
    found = []
    for node in graph.nodes:
        transposed = is_transposed(node)
        if node.target in PRODUCTS | EINSUM and any(not depends[operand.name] for operand in node.all_input_nodes):
            found.append(_raw_product(node, depends))
        if node.target not in KINDS and not transposed:
            continue
        source, weight = node.args[0], node.args[1]
        kind = "conv_transpose" if transposed else KINDS[node.target]
        bias = node.args[2].name if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None
        found.append(
            Operation(
                node.name,
                module_path(node),
                kind,
                source.name,
                weight.name,
                bias,
                macs_of(node),
                depends[node.name],
                _groups(node) if kind == "conv" else 1,
                batch_axis(source.meta["val"].shape) or 0,
            )
        )
    return found


def _groups(node: fx.Node) -> int:
    source: Any = node.args[0]
    weight: Any = node.args[1]
    spatial = weight.meta["val"].ndim - 2
    return int(source.meta["val"].shape[-spatial - 1]) // int(weight.meta["val"].shape[1])


def _raw_product(node: fx.Node, depends: Mapping[str, frozenset[str]]) -> Operation:
    """A product with a bare parameter, such as ``x @ self.weight``, also spelled as an einsum."""
    factors = node.all_input_nodes
    weight = next(factor for factor in factors if not depends[factor.name])
    source = next((factor for factor in factors if depends[factor.name]), weight)
    path, macs = module_path(node), macs_of(node)
    return Operation(node.name, path, "product", source.name, weight.name, None, macs, depends[node.name])


def classify(
    operations: Iterable[Operation], depends: Mapping[str, frozenset[str]]
) -> tuple[tuple[Operation, ...], tuple[tuple[Operation, str], ...]]:
    """Split operations into those to quantize and those that stay in floating point, with the reasons.

    What depends on weights or on the timestep alone is in neither: it is folded, or served by a table.
    """
    quantize: list[Operation] = []
    left: list[tuple[Operation, str]] = []
    for op in operations:
        if op.roles <= {TIMESTEP}:
            continue
        if op.kind == "product":
            left.append((op, "a product with a bare parameter; only nn.Linear and convolutions are quantized"))
        elif op.kind == "conv_transpose":
            left.append((op, "no backend runs a transposed convolution in integers"))
        elif depends[op.weight]:
            left.append((op, f"its weight is computed from the {', '.join(sorted(depends[op.weight]))}"))
        elif op.bias is not None and depends[op.bias]:
            left.append((op, f"its bias is computed from the {', '.join(sorted(depends[op.bias]))}"))
        elif TIMESTEP in op.roles and SAMPLE not in op.roles:
            left.append((op, "modulation: computed once per image from timestep and conditioning"))
        else:
            quantize.append(op)
    return tuple(quantize), tuple(left)


def find_temporal_features(graph: fx.Graph, depends: Mapping[str, frozenset[str]]) -> tuple[TemporalFeature, ...]:
    """Values of t alone that other values read, taken in front of layout operations."""
    temporal = {node for node in graph.nodes if depends[node.name] == {TIMESTEP} and node.op != "placeholder"}
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or depends[node.name] == {TIMESTEP}:
            continue
        for source in node.all_input_nodes:
            if depends[source.name] == {TIMESTEP} and node.target not in SHAPE_QUERIES:
                found.setdefault(_behind_layout(source, temporal))
    mixed = mixed_rows(graph)
    features = []
    for node in found:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise ExportError(f"{module_path(node)}: the temporal value {node.name} is not a tensor")
        symbolic = [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
        rows = rows_per_sample(node) if symbolic else 1
        if rows is None:
            raise ExportError(
                f"{module_path(node)}: temporal value {node.name} has its batch on axis {symbolic[-1]}; "
                "keep the batch of timestep features on axis 0"
            )
        if node in mixed:
            raise ExportError(
                f"{module_path(node)}: temporal value {node.name} has {rows} rows for each sample, but not one sample "
                "after the other; repeat timestep features with repeat_interleave, not with repeat"
            )
        features.append(TemporalFeature(node.name, module_path(node), bool(symbolic), rows or 1))
    return tuple(features)


def _behind_layout(node: fx.Node, temporal: set[fx.Node]) -> fx.Node:
    """Walk from a value back to the operation that computed its numbers."""
    while node.target in LAYOUT or getattr(node.target, "__name__", "") == "getitem":
        source = node.all_input_nodes[0]
        if source not in temporal:
            break
        node = source
    return node


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """Path and class name of each module that a node was issued in, outermost first; without the model itself."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    found = []
    for path, kind in stack.values():
        path = path.removeprefix("model.")
        if path not in ("", "model"):  # the capture's own wrapper
            found.append((path, kind if isinstance(kind, str) else kind.__qualname__))
    return found


def module_path(node: fx.Node) -> str:
    """Path of the module that issued a node."""
    stack = module_stack(node)
    return stack[-1][0] if stack else node.name
