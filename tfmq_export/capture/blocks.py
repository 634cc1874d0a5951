"""The graph cut into blocks: the units that reconstruction optimises one after the other (BRECQ, section 3.2).

A block is a run of consecutive nodes in execution order, so it reads only what earlier blocks wrote,
whatever the module tree looks like. The tree says where to cut: the innermost module that adds a
residual (a ResBlock, a transformer block) is one block; of what is left, every layer is its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from tfmq_export.capture.dependences import SAMPLE, module_path, module_stack
from tfmq_export.capture.rows import mixed_rows, rows_per_sample

aten = torch.ops.aten

ADDITIONS = frozenset({aten.add.Tensor, aten.add_.Tensor})
# Units of the papers that hold smaller residual modules inside, by class name.
KNOWN_BLOCKS = frozenset(
    {"BasicTransformerBlock", "JointTransformerBlock", "DiTBlock", "TemporalBasicTransformerBlock"}
)
MOST_LAYERS = 16  # a "residual module" with more than this is a whole stage


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A run of nodes.

    Attributes:
        path: Module it comes from.
        nodes: Names, in execution order.
        layers: The nodes among them that can be quantized.
        reads: Values of earlier blocks and inputs of the graph that it needs.
        writes: Its values that later blocks, or the caller, need.
    """

    path: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def find_blocks(
    graph: fx.Graph, depends: Mapping[str, frozenset[str]], layers: Iterable[str], served: Iterable[str]
) -> tuple[Block, ...]:
    """Cut what leads to the prediction into blocks.

    Args:
        depends: From ``dependences``.
        layers: Names of the nodes to be quantized.
        served: Names of values that come from elsewhere (temporal tables); what only they need is left out.
    """
    wanted, served = frozenset(layers), frozenset(served)
    nodes = _flow(graph, served)
    units = _units(nodes, depends, wanted)
    labels = [_unit_of(node, units) for node in nodes]
    cuts, mixed = [0], mixed_rows(graph)
    for position in range(1, len(nodes)):
        before, label = labels[position - 1], labels[position]
        started = any(node.name in wanted for node in nodes[cuts[-1] : position])
        after_layer = before is None and nodes[position - 1].name in wanted
        if started and (before != label or after_layer) and _can_cut(nodes, position, mixed):
            cuts.append(position)
    bounds = [*cuts, len(nodes)]
    if len(bounds) > 2 and not any(node.name in wanted for node in nodes[bounds[-2] :]):
        del bounds[-2]  # what follows the last layer belongs to it
    position_of = {node: position for position, node in enumerate(nodes)}
    return tuple(_block(nodes, first, last, position_of, wanted) for first, last in pairwise(bounds))


def temporal_block(graph: fx.Graph, features: Iterable[str], layers: Iterable[str]) -> Block:
    """Everything from the timestep to the temporal features, as one block."""
    wanted, layers = frozenset(features), frozenset(layers)
    results = [node for node in graph.nodes if node.name in wanted]
    nodes = _carrying(graph, _ancestors(graph, results, frozenset()))
    position_of = {node: position for position, node in enumerate(nodes)}
    block = _block(nodes, 0, len(nodes), position_of, layers)
    return replace(block, path="temporal block", writes=tuple(node.name for node in results))


def constant_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that need no input of the graph, not even a shape."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and found.issuperset(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _flow(graph: fx.Graph, served: frozenset[str]) -> list[fx.Node]:
    """Nodes that the prediction needs and that hold data of a batch, in execution order."""
    (output,) = graph.find_nodes(op="output")
    return _carrying(graph, _ancestors(graph, output.all_input_nodes, served))


def _carrying(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that hold data of a batch: neither sizes nor constants."""
    constant = constant_nodes(graph)
    return [node for node in nodes if not _is_size(node) and node not in constant]


def _ancestors(graph: fx.Graph, results: Iterable[fx.Node], served: frozenset[str]) -> list[fx.Node]:
    """Nodes that compute some results, in execution order; not what only ``served`` values need."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed and node.name not in served and node.op != "placeholder":
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _units(nodes: Iterable[fx.Node], depends: Mapping[str, frozenset[str]], layers: frozenset[str]) -> frozenset[str]:
    """Paths of the modules that add a residual and are no larger than a block."""
    sizes: dict[str, int] = {}
    residual: set[str] = set()
    known: set[str] = set()
    for node in nodes:
        stack = module_stack(node)
        for path, kind in stack:
            sizes[path] = sizes.get(path, 0) + (node.name in layers)
            if kind.rsplit(".", 1)[-1] in KNOWN_BLOCKS:
                known.add(path)
        operands = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if node.target in ADDITIONS and len(operands) == 2 and all(SAMPLE in depends[x.name] for x in operands):
            residual.add(stack[-1][0] if stack else "")
    inside_known = {path for path in residual if any(path.startswith(f"{outer}.") for outer in known)}
    return frozenset(path for path in (residual - inside_known) | known if path and 0 < sizes[path] <= MOST_LAYERS)


def _unit_of(node: fx.Node, units: frozenset[str]) -> str | None:
    """The innermost unit that issued a node."""
    return next((path for path, _ in reversed(module_stack(node)) if path in units), None)


def _can_cut(nodes: list[fx.Node], position: int, mixed: frozenset[fx.Node]) -> bool:
    """Whether everything that crosses is a tensor with the batch in front, sample after sample."""
    later = set(nodes[position:])
    crossing = [node for node in nodes[:position] if any(user in later for user in node.users)]
    return all(rows_per_sample(node) and node not in mixed for node in crossing)


def _block(
    nodes: list[fx.Node], first: int, last: int, position_of: Mapping[fx.Node, int], layers: frozenset[str]
) -> Block:
    own = nodes[first:last]
    constant = constant_nodes(own[0].graph)
    reads: dict[str, None] = {}
    for node in own:
        for source in node.all_input_nodes:
            outside = source in position_of and position_of[source] < first
            given = source not in position_of and not _is_size(source) and source not in constant
            if outside or given:
                reads.setdefault(source.name)
    # Users that only a served feature needs are in no block.
    writes = [
        node.name
        for node in own
        if any(user.op == "output" or position_of.get(user, -1) >= last for user in node.users)
    ]
    within = tuple(node.name for node in own if node.name in layers)
    named = next((node for node in own if node.name in layers), own[0])
    return Block(
        _common_path(own, within) or module_path(named),
        tuple(node.name for node in own),
        within,
        tuple(reads),
        tuple(writes),
    )


def _common_path(nodes: list[fx.Node], layers: tuple[str, ...]) -> str:
    """The innermost module that holds all layers of a run."""
    stacks = [[path for path, _ in module_stack(node)] for node in nodes if node.name in layers]
    shared = ""
    for paths in zip(*stacks, strict=False):
        if len(set(paths)) > 1:
            break
        shared = paths[0]
    return shared
