"""A model that can be captured for one row alone, captured for a batch.

A forward that loops over images, takes a list of them or writes its batch size as a number has a graph for a batch of
one. That graph is run on all rows here, operator by operator, and captured again: what comes out has a batch that
varies, and computes for each row what the first graph computes for one.
"""

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from tfmq_export.capture.place import place_of
from tfmq_export.capture.row_rules import RULES, Rows, Step, leads
from tfmq_export.errors import ExportError

aten = torch.ops.aten

CHECKS = frozenset(
    {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
)
"""Operators that compute nothing; what they say holds of one row."""


NEW = frozenset({aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default})
"""What a value lends only its type to: the same in each row."""


class OverRows(nn.Module):
    """The graph of one row as a module for a batch; ``over_rows`` makes one whose signature has the names.

    Args:
        one: The graph, whose inputs go by their names.
        source: The model's name, for errors.
        sample: Name of the input that says how many rows there are.
    """

    def __init__(self, one: fx.GraphModule, source: str, sample: str) -> None:
        super().__init__()
        self.one, self._source, self._sample = one, source, sample

    def forward(self, **inputs: Tensor) -> Any:
        """The prediction, [N, ...].

        Args:
            inputs: [N, ...] by name; a timestep may be [].
        Raises:
            ExportError: an operator that no rule says how to compute for many rows.
        """
        with fx.traceback.preserve_node_meta():
            return _Walk(self.one, self._source, inputs, self._sample).run(enable_io_processing=False)


def over_rows(one: ExportedProgram, source: str, sample: str) -> OverRows:
    """A model for a batch, from its graph for one row.

    Args:
        one: Captured for a batch of one.
    """
    graph = one.run_decompositions({}).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)

    def forward(self: OverRows, *args: Tensor, **named: Tensor) -> Any:
        return OverRows.forward(self, **dict(zip(names, args, strict=False)), **named)

    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])  # type: ignore[attr-defined]
    made: OverRows = type("OverRows", (OverRows,), {"forward": forward})(graph, source, sample)
    return made


class _Walk(fx.Interpreter):
    """One pass over the graph; values that the row decides are ``Rows``."""

    def __init__(self, graph: fx.GraphModule, source: str, inputs: Mapping[str, Tensor], sample: str) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False
        self._source, self._inputs = source, inputs
        self._rows = inputs[sample].shape[0]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            value = self._inputs[n.name]
            return Rows(value, value.ndim, True) if value.ndim else value
        if n.op == "output":
            return self._prediction(n)
        if n.op != "call_function":
            return super().run_node(n)
        with fx.traceback.set_current_meta(n):
            return self._computed(n)

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in CHECKS:
            return None
        if node.target is operator.getitem:
            return args[0][args[1]]
        if not any(isinstance(value, Rows) for value in tree_leaves((args, kwargs), is_leaf=_is_rows)):
            if node.target is aten.pad_sequence.default and len(args[0]) == 1:
                return args[0][0].unsqueeze(0)
            return node.target(*args, **kwargs)  # type: ignore[operator]  # a function, not a name
        if node.target in NEW:
            return node.target(*[each.packed if isinstance(each, Rows) else each for each in args], **kwargs)
        if node.target is aten.sym_size.int:
            return args[0].packed.shape[args[1] if args[0].leads else args[1] + 1]
        return self._of_rows(node, args, kwargs)

    def _of_rows(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        rule = RULES.get(node.target)
        if rule is None:
            raise self._refusal(node, "")
        value = node.meta["val"]
        several = isinstance(value, list | tuple)
        shape = value[0].shape if several else value.shape
        try:
            made = rule(Step(node.target, _named(node.target, args, kwargs), shape, self._rows))
        except NotImplementedError as error:
            raise self._refusal(node, f", {error}") from error
        if several:
            return [Rows(each, len(one.shape), leads(one.shape)) for each, one in zip(made, value, strict=True)]
        return Rows(made, len(shape), leads(shape))

    def _prediction(self, node: fx.Node) -> Tensor:
        found = next((leaf for leaf in tree_leaves(node.args) if isinstance(leaf, fx.Node)), None)
        value = self.env[found] if found is not None else None
        if not isinstance(value, Rows) or not value.leads:
            raise ExportError(f"{self._source}: forward() returns no prediction for each row; return [N, ...]")
        return value.packed

    def _refusal(self, node: fx.Node, why: str) -> ExportError:
        return ExportError(
            f"{self._source}: forward() can be captured for one row alone, and nothing says how to compute "
            f"{node.target} for several{why} ({place_of(node)}); use x.shape[0] where a literal or a loop stands for "
            "the batch"
        )


def _is_rows(value: object) -> bool:
    return isinstance(value, Rows)


def _named(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of an operator by name, those left out included."""
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    left = {argument.name: argument.default_value for argument in schema if argument.name not in given}
    return {argument.name: (given | left)[argument.name] for argument in schema}
