"""Choose where to cut a graph into a part that runs once per prompt and a part that runs at every step.

A value may move to the prologue when it depends on the prompt, perhaps on the timestep, never on the
sample. The cut lies behind the last computation, where values are small and where no engine fuses
across it: layout operations, scalar factors next to them, DequantizeLinear (its codes are a quarter of
the bytes), row lookups and broadcasts stay in the main graph.

What depends on prompt *and* timestep is passed as a table over the whole schedule, so it must pay: only
results of products, no larger than the product, and no table above ``TABLE_BYTES`` per sample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.reading import element_type, known_shape
from tfmq_export.passes.time.binding_times import (
    CONDITIONING,
    SAMPLE,
    SHAPE_QUERIES,
    BindingTime,
    classify_values,
    read_by,
)
from tfmq_export.recipe.names import serves_batch

TABLE_BYTES = 4 << 20
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "MultiHeadAttention", "Einsum"})
LAYOUT = frozenset(
    {"Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Tile", "Slice", "Split", "Cast"}
)
MOVES = frozenset({BindingTime.PROMPT, BindingTime.PROMPT_AND_TIMESTEP})


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The cut.

    Attributes:
        passed: Values the prologue hands to the main graph, all [N, ...] with static sizes behind the batch.
        times: When each value of the graph binds, by name.
        kept: Products that do not read the sample and stay in the main graph all the same, with the reasons.
        batch: Symbol of the batch axis.
    """

    passed: tuple[gs.Variable, ...]
    times: Mapping[str, BindingTime]
    kept: tuple[tuple[str, str], ...]
    batch: str


def find_frontier(graph: gs.Graph, roles: Mapping[str, str], steps: int) -> Frontier:
    """Choose the values to pass.

    Args:
        graph: Sorted.
        roles: "sample", "timestep" or "conditioning" for each graph input.
        steps: Timesteps of the schedule.
    Raises:
        PreconditionError: an input without a role, or a sample without a symbolic batch axis.
    """
    times = classify_values(graph, roles)
    batch = _batch_symbol(graph, roles)
    obstacles = _obstacles(graph, roles, times, batch)
    products = _largest_products(graph, times)

    def movable(value: gs.Tensor) -> bool:
        return bool(value.inputs) and times.get(value.name) in MOVES and value.name not in obstacles

    def why_not(value: gs.Tensor) -> str | None:
        """Why the node behind a movable value stays in the main graph; None where the value is passed."""
        node = value.inputs[0]
        if _finishes(node):
            return "layout"
        if not passable(value, batch):
            return "its type, its batch axis or its sizes are not known"
        data = [source for source in node.inputs if not isinstance(source, gs.Constant)]
        if node.op not in PRODUCTS and elements(value) > sum(elements(source) for source in data):
            return "a broadcast or a row lookup"
        if times[value.name] is BindingTime.PROMPT_AND_TIMESTEP:
            if elements(value) > products.get(value.name, 0):
                return "no product with prompt and timestep is behind it"
            if node.op not in PRODUCTS and any(_is_layout(source) for source in data):
                return "it only adjusts a part of a table"  # 1 + scale, where scale is a slice of the projection
            table = steps * elements(value) * element_type(value).itemsize
            if table > TABLE_BYTES:
                return f"its table would take {table / 2**20:.1f} MiB per sample"
        return None

    passed: dict[str, gs.Tensor] = {}
    reasons: dict[str, str] = {}
    reading = [node for node in graph.nodes if not all(movable(value) for value in node.outputs)]
    wanted = [value for node in reading for value in read_by(node)] + list(graph.outputs)
    while wanted:
        value = wanted.pop()
        if not movable(value) or value.name in passed or value.name in reasons:
            continue
        reason = why_not(value)
        if reason is None:
            passed[value.name] = value
        else:
            reasons[value.name] = reason
            wanted.extend(value.inputs[0].inputs)
    reasons |= obstacles
    ordered = [value for node in graph.nodes for value in node.outputs]
    return Frontier(
        tuple(value for value in ordered if value.name in passed),
        times,
        tuple(
            (value.name, reasons[value.name])
            for value in ordered
            if value.name in reasons and times[value.name] in MOVES and value.inputs[0].op in PRODUCTS
        ),
        batch,
    )


def passable(value: gs.Tensor, batch: str) -> bool:
    """Whether a value can be a graph input, [N, ...] with everything but N known."""
    known = value.dtype is not None and not isinstance(value.dtype, int) and _has_batch(value, batch)
    return known and all(isinstance(size, int) for size in known_shape(value)[1:])


def queries_batch(node: gs.Node, batch: str) -> bool:
    """Whether a Shape node asks for the batch size and nothing else."""
    asked = (node.attrs.get("start", 0), node.attrs.get("end"))
    return node.op == "Shape" and _has_batch(node.inputs[0], batch) and asked == (0, 1)


def _has_batch(value: gs.Tensor, batch: str) -> bool:
    """Whether the first axis of a value is the batch."""
    return bool(value.shape) and known_shape(value)[0] == batch


def _batch_symbol(graph: gs.Graph, roles: Mapping[str, str]) -> str:
    sample = next((value for value in graph.inputs if roles[value.name] == SAMPLE), None)
    if sample is None:
        raise PreconditionError("no input has the role sample")
    if not sample.shape or not isinstance(sample.shape[0], str):
        raise PreconditionError(f"{sample.name}: shape {sample.shape} has no symbolic batch axis in front")
    return str(sample.shape[0])


def _obstacles(
    graph: gs.Graph, roles: Mapping[str, str], times: Mapping[str, BindingTime], batch: str
) -> dict[str, str]:
    """Values that the prologue could not compute for a batch of prompts and timesteps, with the reasons."""
    found = {
        value.name: f"{value.name} has no batch axis in front"
        for value in graph.inputs
        if roles[value.name] == CONDITIONING and not passable(value, batch)
    }
    for node in graph.nodes:
        reason = next((found[value.name] for value in read_by(node) if value.name in found), None)
        if any(isinstance(attribute, gs.Graph) for attribute in node.attrs.values()):
            reason = "control flow"
        elif serves_batch(node.name):
            reason = "the model takes one timestep for the whole batch"
        elif node.op in SHAPE_QUERIES:
            of_sample = times.get(node.inputs[0].name) is BindingTime.SAMPLE
            if of_sample and not queries_batch(node, batch):
                reason = "its shape follows the sample's"
        if reason is not None:
            found |= {value.name: reason for value in node.outputs}
    return found


def _largest_products(graph: gs.Graph, times: Mapping[str, BindingTime]) -> dict[str, int]:
    """Elements per sample of the largest product of prompt and timestep behind each value."""
    largest: dict[str, int] = {}
    for node in graph.nodes:
        behind = max((largest.get(value.name, 0) for value in node.inputs), default=0)
        for value in node.outputs:
            if times[value.name] is BindingTime.PROMPT_AND_TIMESTEP:
                own = elements(value) if node.op in PRODUCTS and value.shape is not None else 0
                largest[value.name] = max(behind, int(own))
    return largest


def _finishes(node: gs.Node) -> bool:
    """Whether a node only brings a computed value into the form its readers want."""
    if node.op in LAYOUT or node.op == "DequantizeLinear":
        return True
    # ONNX Runtime merges a factor behind a layout change with the product that reads it, and one behind a product
    # with that product; the cut must leave both as they are.
    scales = [source for source in node.inputs if isinstance(source, gs.Constant) and math.prod(source.shape) == 1]
    data = [source for source in node.inputs if not isinstance(source, gs.Constant)]
    is_factor = node.op in ("Mul", "Div") and len(scales) == 1 and len(data) == 1
    return is_factor and _is_layout(data[0])


def _is_layout(value: gs.Tensor) -> bool:
    return bool(value.inputs) and value.inputs[0].op in LAYOUT


def elements(value: gs.Tensor) -> float:
    """Elements per sample; infinite where nobody knows."""
    if value.shape is None:
        return math.inf
    return math.prod(size for size in value.shape if isinstance(size, int))
