"""The model captured once, as a graph that PyTorch runs and ONNX shares."""

import copy
import hashlib
import logging
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tfmq_export.capture.attention import AttentionProduct, find_attention
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.dependences import (
    CONDITIONING,
    SAMPLE,
    TIMESTEP,
    Operation,
    TemporalFeature,
    classify,
    dependences,
    find_operations,
    find_temporal_features,
)
from tfmq_export.capture.device import device_of
from tfmq_export.capture.exporter import lowered
from tfmq_export.capture.half_numbers import refuse_half_numbers
from tfmq_export.capture.macs import count_macs
from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.capture.readable_names import readable_names, rename_values, with_names
from tfmq_export.capture.small_numbers import hidden_numbers
from tfmq_export.errors import ExportError
from tfmq_export.recipe.names import scores_name

logger = logging.getLogger(__name__)
aten = torch.ops.aten


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
        attention: Products of two activations inside attention, in forward order.
    """

    onnx: torch.onnx.ONNXProgram
    module: fx.GraphModule
    operations: tuple[Operation, ...]
    left_float: tuple[tuple[Operation, str], ...]
    features: tuple[TemporalFeature, ...]
    macs: int
    roles: Mapping[str, str]
    fingerprint: str
    attention: tuple[AttentionProduct, ...] = ()

    def __repr__(self) -> str:
        return f"DiffusionProgram({len(self.operations)} layers, fingerprint {self.fingerprint[:12]})"

    def value(self, name: str) -> Tensor:
        """A weight of the graph, computed weights included (folded: they depend on no input)."""
        (node,) = (node for node in self.module.graph.nodes if node.name == name)
        return evaluate(self.module, [node], {})[name].detach()


def capture(denoiser: Denoiser) -> DiffusionProgram:
    """Capture a model with a dynamic batch axis and analyse the graph.

    Raises:
        ExportError: torch.export cannot trace the module, its batch axis is fixed, or an argument has a name that a
            graph cannot have.
    """
    program = lowered(denoiser)
    exported = program.exported_program
    assert exported is not None
    module = exported.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise ExportError("torch.export returned no graph module; this torch version is not supported")
    _keep_prediction(module)
    _refuse_lost_names(module, denoiser)
    roles = {
        name: SAMPLE if name == denoiser.sample else TIMESTEP if name == denoiser.timestep else CONDITIONING
        for name in denoiser.example_inputs
    }
    depends = dependences(module.graph, roles)
    refuse_half_numbers(module.graph, depends, denoiser.source)
    operations, left_float = classify(find_operations(module.graph, depends), depends)
    features = find_temporal_features(module.graph, depends)
    attention = find_attention(module.graph, depends)
    names = [op.name for op in operations] + [feature.name for feature in features]
    merged = _optimize(program, names + [product.name for product in attention])
    _merge(module, merged)
    operations = tuple(op for op in operations if op.name not in merged)
    features = _kept(features, merged)
    attention = tuple(product for product in attention if product.source not in merged)
    macs = count_macs(module.graph, lambda node: not depends[node.name] <= {TIMESTEP})
    fingerprint = _fingerprint(module, exported)
    _free_of_strides(module)
    logger.info("captured %d nodes, %d operations to quantize", len(module.graph.nodes), len(operations))
    return _named_after_modules(
        DiffusionProgram(program, module, operations, left_float, features, macs, roles, fingerprint, attention)
    )


def program_on(program: DiffusionProgram, device: torch.device) -> DiffusionProgram:
    """A program whose graph computes on a device, weights and what the graph makes itself included."""
    if device_of(program.module) == device:
        return program
    graph = copy.deepcopy(program.module.graph)
    held: dict[str, nn.Parameter] = {}
    for node in graph.nodes:
        node.args, node.kwargs = tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(program.module).detach().to(device)
            held[str(node.target)] = nn.Parameter(value, requires_grad=False)
    return replace(program, module=fx.GraphModule(held, graph))


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


def _refuse_lost_names(module: fx.GraphModule, denoiser: Denoiser) -> None:
    kept = {node.name for node in module.graph.find_nodes(op="placeholder")}
    for name in denoiser.example_inputs:
        if name not in kept:
            raise ExportError(
                f"{denoiser.source}: forward() has an argument {name!r}, which is a name of Python's own that a "
                "captured graph cannot have; rename it, or return (module, draw) in place of a Description"
            )


def _optimize(program: torch.onnx.ONNXProgram, names: Iterable[str]) -> dict[str, str]:
    """Simplify the ONNX graph around the named values, which passes look up later.

    The exporter's optimizer renames, merges and fuses at will (a convolution disappears into the batch
    norm behind it), but it leaves graph outputs alone: so the named values are outputs meanwhile.

    Returns:
        Values it found equal to another or to an input, and that other (a layer called twice on one input).
    """
    outputs = program.model.graph.outputs
    prediction = outputs[0]
    values = {value.name: value for node in program.model.graph for value in node.outputs}
    outputs[:] = [prediction, *(values[name] for name in names if name in values and values[name] is not prediction)]
    with hidden_numbers(program.model.graph), quiet_logger("onnxscript"), quiet_logger("onnx_ir"):
        program.optimize()
    merged = {}
    for value in outputs:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Identity" else None
        if source is not None and (source in outputs or source in program.model.graph.inputs):
            merged[str(value.name)] = str(source.name)
    outputs[:] = [outputs[0]]
    return merged


def _kept(features: Iterable[TemporalFeature], merged: Mapping[str, str]) -> tuple[TemporalFeature, ...]:
    """The features that are left; a slice that takes all of the timestep is the timestep itself."""
    features = tuple(features)
    found = {feature.name: feature for feature in features if feature.name not in merged}
    for feature in features:
        if feature.name in merged:
            name = merged[feature.name]
            found.setdefault(name, replace(feature, name=name))
    return tuple(found.values())


def _merge(module: fx.GraphModule, merged: Mapping[str, str]) -> None:
    """Compute equal values once, as the ONNX graph does."""
    nodes = {node.name: node for node in module.graph.nodes}
    for name, kept in merged.items():
        nodes[name].replace_all_uses_with(nodes[kept])
    module.graph.eliminate_dead_code()
    module.recompile()


def _free_of_strides(module: fx.GraphModule) -> None:
    """Let every view be a reshape: values that were cached, or come from another engine, lie in memory as they please.

    Behind the fingerprint, to which the graph is as it was captured.
    """
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    module.recompile()


def _named_after_modules(program: DiffusionProgram) -> DiffusionProgram:
    """Behind the fingerprint as well: what was hashed under the capture's own names stays the same model."""
    graph, module = program.onnx.model.graph, program.module
    taken = {str(value.name) for node in graph for value in node.outputs} | {*graph.initializers}
    layers = {op.name for op in (*program.operations, *(op for op, _ in program.left_float))}
    wanted = readable_names(module.graph, layers, taken)
    # What the exporter folded is named already, as a weight.
    renamed, names = with_names(
        module.graph, {old: new for old, new in wanted.items() if old not in graph.initializers}
    )
    rename_values(graph, names)

    def named(op: Operation) -> Operation:
        bias = None if op.bias is None else names[op.bias]
        return replace(op, name=names[op.name], input=names[op.input], weight=names[op.weight], bias=bias)

    def named_product(product: AttentionProduct) -> AttentionProduct:
        source = names[product.source]
        return replace(product, source=source, name=source if product.name == product.source else scores_name(source))

    return replace(
        program,
        module=fx.GraphModule(module, renamed),
        operations=tuple(named(op) for op in program.operations),
        left_float=tuple((named(op), reason) for op, reason in program.left_float),
        features=tuple(replace(item, name=names[item.name]) for item in program.features),
        attention=tuple(named_product(product) for product in program.attention),
    )


def _fingerprint(module: fx.GraphModule, exported: torch.export.ExportedProgram) -> str:
    digest = hashlib.sha256(str(module.graph).encode())
    held = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    for name, value in sorted({**exported.state_dict, **held}.items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
