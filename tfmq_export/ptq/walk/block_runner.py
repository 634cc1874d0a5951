"""Running one block of the captured graph on rows of cached activations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from tfmq_export.capture.blocks import Block, constant_nodes
from tfmq_export.capture.device import device_of
from tfmq_export.capture.rows import elements_for_one, rows_per_sample

ROWS = 16  # of one call, at most
VALUES = 16 << 20  # of the block's largest tensor

Compute = Callable[..., Tensor]
LayerRule = Callable[[Compute, Sequence[Tensor]], Tensor]
"""What to do in place of a layer: ``rule(compute, operands)``, where ``compute(*operands)`` is the plain layer.

The operands are input and weight.
"""


class BlockRunner:
    """One block, ready to run; keeps no activations.

    Args:
        module: The graph the block was cut from.
    """

    def __init__(self, module: fx.GraphModule, block: Block) -> None:
        self.device = device_of(module)
        by_name = {node.name: node for node in module.graph.nodes}
        self.block = block
        self._nodes = [by_name[name] for name in block.nodes]
        self._reads = [by_name[name] for name in block.reads]
        self._writes = [by_name[name] for name in block.writes]
        inside = {*self._nodes, *self._reads}
        outside = {source for node in self._nodes for source in node.all_input_nodes if source not in inside}
        constant = constant_nodes(module.graph)
        self._constants = _evaluate_constants(module, [node for node in outside if node in constant])
        self._sizes = [node for node in outside if node not in constant]
        self._spent = _spent(self._nodes, self._writes)

    @property
    def rows_at_once(self) -> int:
        """Rows of one call on a CPU: more values than its caches hold are no faster, and fill the memory."""
        return rows_at_once(self._nodes)

    def node(self, name: str) -> fx.Node:
        """One of the block's nodes."""
        by_name: dict[str, fx.Node] = {node.name: node for node in self._nodes}
        return by_name[name]

    def __call__(self, values: Mapping[str, Tensor], rules: Mapping[str, LayerRule]) -> dict[str, Tensor]:
        """Compute what the block writes.

        Args:
            values: What it reads, by name; one row per sample.
            rules: By layer; the others run as they are.
        Returns:
            By name, one row per sample.
        """
        count = len(next(iter(values.values())))
        env: dict[fx.Node, Any] = dict(self._constants)
        env.update((node, _size(node, count)) for node in self._sizes)
        env.update((node, _as_in_graph(values[node.name], node)) for node in self._reads)
        for node in self._nodes:
            args, kwargs = tree_map_only(fx.Node, env.__getitem__, (node.args, node.kwargs))
            rule = rules.get(node.name)
            if rule is None:
                env[node] = node.target(*args, **kwargs)  # decomposed graphs hold functions only
            else:
                env[node] = apply_rule(rule, node, args, kwargs)
            for spent in self._spent[node]:
                env.pop(spent, None)
        return {node.name: _by_sample(env[node], count) for node in self._writes}


def rows_at_once(nodes: Iterable[fx.Node]) -> int:
    """Rows of one call of some nodes: as many as their largest tensor allows, at least one."""
    shaped = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    return max(1, min(ROWS, VALUES // max((elements_for_one(node) for node in shaped), default=1)))


def _spent(nodes: Sequence[fx.Node], writes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The values that no node behind a node reads; what the block writes is kept."""
    spent: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    seen = set(writes)
    for node in reversed(nodes):
        for source in (node, *node.all_input_nodes):
            if source not in seen:
                seen.add(source)
                spent[node].append(source)
    return spent


def apply_rule(rule: LayerRule, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Run a rule in place of a node."""

    def compute(*given: Any) -> Tensor:
        return node.target(*given, *args[len(given) :], **kwargs)  # type: ignore[operator, no-any-return]

    return rule(compute, args[:2])


def _evaluate_constants(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    env: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in env:
            if node.op == "get_attr":
                holder: Any = module
                for part in str(node.target).split("."):
                    holder = getattr(holder, part)
                env[node] = holder.detach()
            else:
                args, kwargs = tree_map_only(fx.Node, value, (node.args, node.kwargs))
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[node]

    with torch.no_grad():
        return {node: value(node) for node in nodes}


def _size(node: fx.Node, count: int) -> Any:
    """A size that the graph reads off its inputs, for this many samples: nothing but the batch varies."""
    value = node.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        expression = value.node.expr
        return type(value.node.hint)(expression.subs(dict.fromkeys(expression.free_symbols, count)))
    return value


def _as_in_graph(rows: Tensor, node: fx.Node) -> Tensor:
    """Undo ``_by_sample``: some values have several rows of axis 0 per sample."""
    factor = rows_per_sample(node)
    if not factor:
        return rows[0]  # one timestep for the whole batch
    return rows if factor == 1 else rows.flatten(0, 1)


def _by_sample(value: Tensor, count: int) -> Tensor:
    if not value.ndim:
        return value.expand(count)  # a scalar that depends on one timestep
    return value if len(value) == count else value.reshape(count, -1, *value.shape[1:])
