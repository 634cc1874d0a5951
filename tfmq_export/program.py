"""The model captured once as a graph, and what that graph says about itself.

Which operations can be quantized, which values depend on the timestep alone, how much each operation
costs: all of it is read off data dependences, never off module names.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tfmq_export.denoiser import Denoiser
from tfmq_export.errors import ExportError

logger = logging.getLogger(__name__)
aten = torch.ops.aten

SAMPLE, TIMESTEP, CONDITIONING = "sample", "timestep", "conditioning"
OPSET = 23  # GroupNormalization and Attention stay single nodes

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
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
CONVOLUTION_IS_TRANSPOSED = 6  # position of the flag among aten.convolution's arguments

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
    """

    name: str
    path: str
    kind: str
    input: str
    weight: str
    bias: str | None
    macs: int
    roles: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class TemporalFeature:
    """A value on the frontier of the temporal block (TFMQ-DM, section 3.1).

    Attributes:
        per_sample: Whether its first axis is the batch.
    """

    name: str
    path: str
    per_sample: bool


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionProgram:
    """The captured graph and its analysis.

    Attributes:
        onnx: The float ONNX graph. Its values carry the names of ``module``'s nodes.
        module: The graph the ONNX exporter lowered, runnable.
        operations: To be quantized, in forward order.
        left_float: Operations that stay in floating point, each with the reason.
        features: The temporal features.
        macs: Of the compiled model for one sample: the temporal block, replaced by tables, is not counted.
        roles: "sample", "timestep" or "conditioning" for each input name.
        fingerprint: Hash of graph and weights.
    """

    onnx: torch.onnx.ONNXProgram
    module: fx.GraphModule
    operations: tuple[Operation, ...]
    left_float: tuple[tuple[Operation, str], ...]
    features: tuple[TemporalFeature, ...]
    macs: int
    roles: Mapping[str, str]
    fingerprint: str

    def value(self, name: str) -> Tensor:
        """A weight of the graph, computed weights included (folded: they depend on no input)."""
        (node,) = (node for node in self.module.graph.nodes if node.name == name)
        return evaluate(self.module, [node], {})[name].detach()


def capture(denoiser: Denoiser) -> DiffusionProgram:
    """Capture a model with a dynamic batch axis and analyse the graph.

    Raises:
        ExportError: torch.export cannot trace the module, or its batch axis is fixed.
    """
    program = _export(denoiser)
    exported = program.exported_program
    assert exported is not None
    module = exported.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise ExportError("torch.export returned no graph module; this torch version is not supported")
    _keep_prediction(module)
    roles = {
        name: SAMPLE if name == denoiser.sample else TIMESTEP if name == denoiser.timestep else CONDITIONING
        for name in denoiser.example_inputs
    }
    _check_batch(module, denoiser)
    depends = dependences(module.graph, roles)
    operations, left_float = _classify(_operations(module.graph, depends), depends)
    features = _temporal_features(module.graph, depends)
    merged = _optimize(program, [op.name for op in operations] + [feature.name for feature in features])
    _merge(module, merged)
    operations = tuple(op for op in operations if op.name not in merged)
    features = tuple(feature for feature in features if feature.name not in merged)
    macs = _count_macs(module, denoiser.example_inputs, depends)
    logger.info("captured %d nodes, %d operations to quantize", len(module.graph.nodes), len(operations))
    return DiffusionProgram(
        program, module, operations, left_float, features, macs, roles, _fingerprint(module, exported)
    )


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


def evaluate(
    module: fx.GraphModule,
    wanted: Iterable[fx.Node],
    feeds: Mapping[str, Tensor],
    interpreter: type[fx.Interpreter] = fx.Interpreter,
) -> dict[str, Tensor]:
    """Compute a few values of the graph and what they need, nothing else."""
    wanted = list(wanted)
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    runner = interpreter(module, garbage_collect_values=False)
    for node in module.graph.nodes:
        if node in needed:
            runner.env[node] = feeds[node.name] if node.op == "placeholder" else runner.run_node(node)
    return {node.name: runner.env[node] for node in wanted}


def module_path(node: fx.Node) -> str:
    """Path of the module that issued a node."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    path = list(stack.values())[-1][0] if stack else ""
    return path.removeprefix("model.") or node.name


def _export(denoiser: Denoiser) -> torch.onnx.ONNXProgram:
    """Capture and lower in one go.

    The exporter renames nodes when it decomposes the captured program, so the analysis must read the
    decomposed one: then a value has the same name in PyTorch and in ONNX.
    """
    inputs = dict(denoiser.example_inputs)
    dynamic = {name: {0: torch.export.Dim.AUTO} if value.ndim else None for name, value in inputs.items()}
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            exported = torch.export.export(denoiser.module, (), inputs, dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    except Exception as error:  # torch.export has no common base; whatever it raises comes from the model
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{denoiser.source}: torch.export cannot capture this module: {first}; "
            "replace data-dependent Python control flow in forward() by tensor operations"
        ) from error
    assert program is not None
    return program


def _keep_prediction(module: fx.GraphModule) -> None:
    """Drop every result but the first tensor, and what computes only them."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    results = [leaf for leaf in tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    if not results:
        raise ExportError("forward() returns no tensor that depends on its inputs; return the prediction")
    output.args = (results[0],)
    graph.set_codegen(fx.graph.CodeGen())  # inputs and output are flat now
    graph.eliminate_dead_code()
    module.recompile()


def _optimize(program: torch.onnx.ONNXProgram, names: Iterable[str]) -> dict[str, str]:
    """Simplify the ONNX graph around the named values, which passes look up later.

    The exporter's optimizer renames, merges and fuses at will (a convolution disappears into the batch
    norm behind it), but it leaves graph outputs alone: so the named values are outputs meanwhile.

    Returns:
        Values it found equal to another, and that other (a layer called twice on one input).
    """
    outputs = program.model.graph.outputs
    prediction = outputs[0]
    values = {value.name: value for node in program.model.graph for value in node.outputs}
    outputs[:] = [prediction, *(values[name] for name in names if name in values and values[name] is not prediction)]
    program.optimize()
    merged = {}
    for value in outputs:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Identity" else None
        if source is not None and source in outputs:
            merged[str(value.name)] = str(source.name)
    outputs[:] = [outputs[0]]
    return merged


def _merge(module: fx.GraphModule, merged: Mapping[str, str]) -> None:
    """Compute equal values once, as the ONNX graph does."""
    nodes = {node.name: node for node in module.graph.nodes}
    for name, kept in merged.items():
        nodes[name].replace_all_uses_with(nodes[kept])
    module.graph.eliminate_dead_code()
    module.recompile()


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Silence a library's warnings about packages this project does not use."""
    noisy = logging.getLogger(logger_name)
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(before)


def _check_batch(module: fx.GraphModule, denoiser: Denoiser) -> None:
    samples = [node for node in module.graph.find_nodes(op="placeholder") if node.name == denoiser.sample]
    if not samples or not samples[0].users:
        raise ExportError(f"{denoiser.source}: forward() does not use its argument {denoiser.sample!r}")
    (output,) = module.graph.find_nodes(op="output")
    for node in (samples[0], output.args[0]):
        shape = node.meta["val"].shape
        if not shape or isinstance(shape[0], int):
            raise ExportError(
                f"{denoiser.source}: forward() fixes the batch size ({node.name} has shape {list(shape)}); "
                "use x.shape[0] where a literal or int(...) stands for the batch"
            )


def _operations(graph: fx.Graph, depends: Mapping[str, frozenset[str]]) -> list[Operation]:
    found = []
    for node in graph.nodes:
        transposed = node.target in TRANSPOSED or (
            node.target is aten.convolution.default and node.args[CONVOLUTION_IS_TRANSPOSED]
        )
        if node.target in PRODUCTS and any(not depends[operand.name] for operand in node.all_input_nodes):
            found.append(_raw_product(node, depends))
        if node.target not in KINDS and not transposed:
            continue
        source, weight = node.args[0], node.args[1]
        shape = weight.meta["val"].shape
        positions = _per_sample(source if transposed else node)
        per_position = weight.meta["val"].numel() // shape[0]  # multiplications for one output (or transposed input)
        kind = "conv_transpose" if transposed else KINDS[node.target]
        bias = node.args[2].name if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None
        macs = positions * per_position
        roles = depends[node.name]
        found.append(Operation(node.name, module_path(node), kind, source.name, weight.name, bias, macs, roles))
    return found


def _raw_product(node: fx.Node, depends: Mapping[str, frozenset[str]]) -> Operation:
    """A product with a bare parameter, such as ``x @ self.weight``."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    weight, source = (left, right) if not depends[left.name] else (right, left)
    macs = _per_sample(node) * left.meta["val"].shape[-1]
    return Operation(node.name, module_path(node), "product", source.name, weight.name, None, macs, depends[node.name])


def _per_sample(node: fx.Node) -> int:
    """Number of elements of a value for one sample."""
    count = 1
    for size in node.meta["val"].shape:
        if isinstance(size, int):
            count *= size
    return count


def _classify(
    operations: Iterable[Operation], depends: Mapping[str, frozenset[str]]
) -> tuple[tuple[Operation, ...], tuple[tuple[Operation, str], ...]]:
    quantize: list[Operation] = []
    left: list[tuple[Operation, str]] = []
    for op in operations:
        if op.roles <= {TIMESTEP}:
            continue  # folded, or served by a table
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


def _temporal_features(graph: fx.Graph, depends: Mapping[str, frozenset[str]]) -> tuple[TemporalFeature, ...]:
    """Values of t alone that other values read, taken in front of layout operations."""
    temporal = {node for node in graph.nodes if depends[node.name] == {TIMESTEP} and node.op != "placeholder"}
    batch = next(
        (n.meta["val"].shape[0] for n in graph.nodes if n.op == "placeholder" and SAMPLE in depends[n.name]), None
    )
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or depends[node.name] == {TIMESTEP}:
            continue
        for source in node.all_input_nodes:
            if depends[source.name] == {TIMESTEP} and node.target not in SHAPE_QUERIES:
                found.setdefault(_behind_layout(source, temporal))
    features = []
    for node in found:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise ExportError(f"{module_path(node)}: the temporal value {node.name} is not a tensor")
        symbolic = [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
        if symbolic not in ([], [0]):
            raise ExportError(
                f"{module_path(node)}: temporal value {node.name} has its batch on axis {symbolic[-1]}; "
                "keep the batch of timestep features on axis 0"
            )
        features.append(TemporalFeature(node.name, module_path(node), bool(symbolic) and batch is not None))
    return tuple(features)


def _behind_layout(node: fx.Node, temporal: set[fx.Node]) -> fx.Node:
    """Walk from a value back to the operation that computed its numbers."""
    while node.target in LAYOUT or getattr(node.target, "__name__", "") == "getitem":
        source = node.all_input_nodes[0]
        if source not in temporal:
            break
        node = source
    return node


def _count_macs(module: fx.GraphModule, inputs: Mapping[str, Tensor], depends: Mapping[str, frozenset[str]]) -> int:
    """For one sample, without the layers of the temporal block."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    mapping: dict[Any, Callable[..., int]] = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    batch = max(len(value) for value in inputs.values() if value.ndim)
    with torch.no_grad(), counter:
        module(**inputs)
    total = counter.get_total_flops() // 2
    nodes = {node.name: node for node in module.graph.nodes}
    for op in _operations(module.graph, depends):
        if op.roles == {TIMESTEP}:
            has_batch = not isinstance(nodes[op.name].meta["val"].shape[0], int)
            total -= op.macs * (batch if has_batch else 1)
    return total // batch


def _fingerprint(module: fx.GraphModule, exported: torch.export.ExportedProgram) -> str:
    digest = hashlib.sha256(str(module.graph).encode())
    for name, value in sorted(exported.state_dict.items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
