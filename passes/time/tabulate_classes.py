"""Make tables of what depends only on class label and timestep, which both have finitely many values.

    value(t, y)  ==  table[row(t), y]        T * K rows

A label that is only read through an embedding table of K rows takes K values. Where the tables stay below
``limit`` bytes, they replace the modulation layers at compile time: no prologue, no products, one lookup.
Evaluated in float64, as the temporal tables are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, export_model
from tfmq_export.passes.reading import int_attribute, sizes_per_sample, static_size
from tfmq_export.passes.time.binding_times import CONDITIONING, SAMPLE
from tfmq_export.passes.time.prologue_frontier import Frontier, find_frontier
from tfmq_export.passes.time.prologue_graph import is_table, prologue_of
from tfmq_export.passes.time.split_prologue import row_and_column, take_over
from tfmq_export.passes.time.tabulate_tib import computed_from_time
from tfmq_export.recipe.names import ROWS, gather_name, lookup_name, table_name

LIMIT = 8 << 20


@dataclass(frozen=True)
class TabulateClasses(Pass):
    """Serve what depends on a class label, and perhaps the timestep, from tables.

    Attributes:
        roles: "sample", "timestep" or "conditioning" for each graph input.
        steps: Timesteps of the schedule, T.
        keep: Names of nodes that must stay: quantized layers, which the recipe binds to.
        limit: Bytes of all tables of one label.
    """

    roles: Mapping[str, str]
    steps: int
    keep: frozenset[str] = frozenset()
    limit: int = LIMIT
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for name in (name for name, role in self.roles.items() if role == "timestep"):
            if strays := computed_from_time(graph, name):
                raise PreconditionError(f"{strays[0]} computes from {name!r}; run TabulateTib first")

    def apply(self, graph: gs.Graph) -> Changes:
        changed: list[str] = []
        skipped: list[tuple[str, str]] = []
        for label in [value for value in graph.inputs if self.roles.get(value.name) == CONDITIONING]:
            classes = class_count(label)
            if classes is None:
                skipped.append((label.name, "not a label that is only looked up in tables"))
                continue
            # For this label every other prompt is as good as a sample: unknown.
            roles = {name: SAMPLE if role == CONDITIONING else role for name, role in self.roles.items()}
            roles[label.name] = CONDITIONING
            frontier = find_frontier(graph, roles, self.steps)
            prologue = prologue_of(graph, frontier, roles, self.steps) if frontier.passed else None
            reason = self._obstacle(frontier, prologue, classes)
            if prologue is None or reason is not None:
                skipped.append((label.name, reason or "nothing is computed from it but lookups"))
                continue
            self._serve(graph, frontier, label, tables_of(prologue, label.name, classes))
            changed += [value.name for value in frontier.passed]
            graph.cleanup().toposort()
        return Changes(tuple(changed), tuple(skipped))

    def _obstacle(self, frontier: Frontier, prologue: gs.Graph | None, classes: int) -> str | None:
        quantized = sorted(self.keep & {node.name for node in prologue.nodes}) if prologue is not None else []
        if quantized:
            return f"{quantized[0]} is quantized"
        size = sum(
            4 * classes * math.prod(sizes_per_sample(value)) * (self.steps if is_table(value, frontier) else 1)
            for value in frontier.passed
        )
        if size > self.limit:
            return f"its tables would take {size / 2**20:.1f} MiB, the limit is {self.limit / 2**20:.1f}"
        return None

    def _serve(
        self, graph: gs.Graph, frontier: Frontier, label: gs.Tensor, tables: Mapping[str, NDArray[np.float32]]
    ) -> None:
        values = graph.tensors()
        index: gs.Tensor | None = None
        for value in frontier.passed:
            served = take_over(values[value.name])
            name, classes = gather_name(value.name), lookup_name(f"{value.name}.classes")
            if is_table(value, frontier):
                if index is None:
                    (sample,) = (x for x in graph.inputs if self.roles[x.name] == SAMPLE)
                    index = row_and_column(graph, values[ROWS], sample, label, prefix=lookup_name(label.name))
                inputs = [constant(classes, tables[table_name(value.name)]), index]
                graph.nodes.append(gs.Node("GatherND", name, {}, inputs, [served]))
            else:
                inputs = [constant(classes, tables[value.name]), label]
                graph.nodes.append(gs.Node("Gather", name, {"axis": 0}, inputs, [served]))


def class_count(label: gs.Tensor) -> int | None:
    """Number of classes of an int64 input [N] that is only looked up in constant tables; else None."""
    if label.dtype != np.int64 or label.shape is None or len(label.shape) != 1 or not label.outputs:
        return None
    rows = []
    for node in label.outputs:
        looks_up = node.op == "Gather" and int_attribute(node, "axis", 0) == 0 and node.inputs[1] is label
        if not looks_up or not isinstance(node.inputs[0], gs.Constant):
            return None
        rows.append(static_size(node.inputs[0], 0))
    return min(rows)


def tables_of(prologue: gs.Graph, label: str, classes: int) -> dict[str, NDArray[np.float32]]:
    """What the prologue returns for every class, computed in float64."""
    model = _widened(export_model(prologue))
    names = [value.name for value in model.graph.output]
    found = ReferenceEvaluator(model).run(None, {label: np.arange(classes, dtype=np.int64)})
    return {name: np.asarray(value).astype(np.float32) for name, value in zip(names, found, strict=True)}


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every float32 constant and cast in float64."""
    for initializer in model.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(initializer).astype(np.float64)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
    for value in (*model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return model
