"""Replace the temporal information block by lookup tables.

    feature_i(t)  ==  Gather(table_i, row(t))        for every t of the schedule

``row`` compares t with the whole schedule: a timestep that is not in it gets a row behind the last,
and Gather fails. Integers and reals take the same path, compared exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, read_instead, variable
from tfmq_export.passes.reading import computed, element_type
from tfmq_export.passes.time.binding_times import binding_times, read_by
from tfmq_export.recipe.names import ROWS, gather_name, is_lookup, lookup_name, rows_name, single_name
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe

STEPS = "steps"

# How the layout operators of ``capture/dependences.py`` are written in ONNX.
LAYOUT = frozenset(
    {"Unsqueeze", "Squeeze", "Reshape", "Slice", "Split", "Transpose", "Expand", "Flatten", "Identity", "Cast"}
    | {"SplitToSequence", "SequenceAt", "Dropout"}
)


@dataclass(frozen=True)
class TabulateTib(Pass):
    """Serve every temporal feature from its table; afterwards nothing else reads the timestep."""

    tib: TibRecipe
    timestep: str
    sample: str
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        inputs = {value.name: value for value in graph.inputs}
        for name in (self.timestep, self.sample):
            if name not in inputs:
                raise PreconditionError(f"the graph has no input {name!r}, only {', '.join(sorted(inputs))}")
        schedule, dtype = self.tib.timesteps, element_type(inputs[self.timestep])
        if not np.array_equal(schedule.array.astype(dtype), schedule.array):
            raise PreconditionError(f"the graph takes {dtype} timesteps, which cannot hold {schedule.describe()}")

    def apply(self, graph: gs.Graph) -> Changes:
        values = graph.tensors()
        timestep = computed(values[self.timestep])
        readers_of_time = list(timestep.outputs)
        changed: list[str] = []
        skipped: list[tuple[str, str]] = []
        rows = _row_of(graph, timestep, self.tib)
        batch: gs.Variable | None = None
        for table in self.tib.tables:
            feature = values.get(table.name)
            if feature is None:
                skipped.append((table.path, f"the exporter merged {table.name} with an equal value"))
                continue
            if table.per_sample and batch is None:
                batch = _batch_of(graph, values[self.sample])
            served = _typed_like(graph, feature, _look_up(graph, table, rows, batch), lookup_name(table.name))
            # The lookup itself reads the timestep.
            read_instead(feature, served, readers_of_time if feature is timestep else None)
            graph.outputs = [served if value is feature else value for value in graph.outputs]
            changed.append(table.path)
        # One timestep serves the whole batch, or each sample brings its own.
        timestep.shape = (STEPS,)
        return Changes(tuple(changed), tuple(skipped))

    def ensures(self, graph: gs.Graph) -> None:
        strays = computed_from_time(graph, self.timestep)
        if strays:
            raise PostconditionError(
                f"{strays[0]} still computes from {self.timestep!r} ({len(strays)} nodes); the recipe lacks its table"
            )


def _typed_like(graph: gs.Graph, feature: gs.Tensor, served: gs.Variable, prefix: str) -> gs.Variable:
    """Tables are float32; a mask or an index gets its own type back."""
    if feature.dtype is None or feature.dtype == np.float32:
        return served
    dtype = element_type(feature)
    typed = variable(f"{prefix}.typed", dtype)
    to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    graph.nodes.append(gs.Node("Cast", f"{prefix}.type", {"to": to}, inputs=[served], outputs=[typed]))
    return typed


def computed_from_time(graph: gs.Graph, timestep: str) -> list[str]:
    """Nodes whose only data is the timestep, apart from the row lookup."""
    depends = binding_times(graph)
    return [
        node.name
        for node in graph.nodes
        if not is_lookup(node.name)
        and any(depends.get(value.name, frozenset()) == {timestep} for value in read_by(node))
        and all(depends.get(value.name, frozenset()) <= {timestep} for value in read_by(node))
        and not _moves_a_row(node)
    ]


def _moves_a_row(node: gs.Node) -> bool:
    """Whether a node only reshapes, splits, rounds or picks from table rows."""
    picks = node.op == "Gather" and isinstance(node.inputs[1], gs.Constant)  # select: x[:, 0]
    if node.op not in LAYOUT | {"QuantizeLinear", "DequantizeLinear"} and not picks:
        return False
    source = node.inputs[0].inputs
    return bool(source) and (is_lookup(source[0].name) or _moves_a_row(source[0]))


def _row_of(graph: gs.Graph, timestep: gs.Tensor, tib: TibRecipe) -> gs.Variable:
    """Row of each timestep, int64 [steps]; T, which no table has, where it is not in the schedule."""
    count, dtype = len(tib.timesteps), element_type(timestep)
    column = variable(lookup_name("column"), dtype=dtype)
    equal = variable(lookup_name("equal"), dtype=np.bool_)
    hits = variable(lookup_name("hits"), dtype=np.int64)
    rows = variable(ROWS, dtype=np.int64, shape=(STEPS,))
    graph.nodes += [
        gs.Node(
            "Reshape",
            lookup_name("as_column"),
            inputs=[timestep, constant(lookup_name("column_shape"), np.array([-1, 1], np.int64))],
            outputs=[column],
        ),
        gs.Node(
            "Equal",
            lookup_name("compare"),
            inputs=[column, constant(lookup_name("schedule"), tib.timesteps.array.astype(dtype))],
            outputs=[equal],
        ),
        gs.Node(
            "Where",
            lookup_name("match"),
            inputs=[
                equal,
                constant(lookup_name("row_numbers"), np.arange(count, dtype=np.int64)),
                constant(lookup_name("no_row"), np.array(count, np.int64)),
            ],
            outputs=[hits],
        ),
        gs.Node(
            "ReduceMin",
            lookup_name("row"),
            attrs={"keepdims": 0},
            inputs=[hits, constant(lookup_name("row_axis"), np.array([1], np.int64))],
            outputs=[rows],
        ),
    ]
    return rows


def _batch_of(graph: gs.Graph, sample: gs.Tensor) -> gs.Variable:
    """The batch size, int64 [1]."""
    batch = variable(lookup_name("batch"), dtype=np.int64, shape=(1,))
    graph.nodes.append(
        gs.Node("Shape", lookup_name("batch_size"), attrs={"start": 0, "end": 1}, inputs=[sample], outputs=[batch])
    )
    return batch


def _look_up(graph: gs.Graph, table: TemporalTable, rows: gs.Variable, batch: gs.Variable | None) -> gs.Variable:
    """Gather a table's rows and give them the shape of the value they replace."""
    prefix = lookup_name(table.name)
    gathered = variable(f"{prefix}.row", dtype=np.float32, shape=(STEPS, *table.rows.shape[1:]))
    values = constant(rows_name(table.name), table.rows)
    graph.nodes.append(
        gs.Node("Gather", gather_name(table.name), attrs={"axis": 0}, inputs=[values, rows], outputs=[gathered])
    )
    served = variable(f"{prefix}.feature", dtype=np.float32)
    if batch is None or not table.per_sample:
        shape = constant(f"{prefix}.shape", np.array(table.rows.shape[1:], np.int64))
        graph.nodes.append(gs.Node("Reshape", single_name(table.name), inputs=[gathered, shape], outputs=[served]))
        return served
    if table.rows.ndim == 1:
        size: gs.Tensor = batch
    else:
        size = variable(f"{prefix}.size", dtype=np.int64)
        ones = constant(f"{prefix}.ones", np.ones(table.rows.ndim - 1, np.int64))
        if table.rows_per_sample > 1:
            ones.values[0] = table.rows_per_sample
        graph.nodes.append(
            gs.Node("Concat", f"{prefix}.full_size", attrs={"axis": 0}, inputs=[batch, ones], outputs=[size])
        )
    if table.rows_per_sample == 1:
        graph.nodes.append(gs.Node("Expand", f"{prefix}.expand", inputs=[gathered, size], outputs=[served]))
        return served
    # The rows of a sample, sample after sample.
    expanded = variable(f"{prefix}.rows", dtype=np.float32)
    folded = constant(f"{prefix}.folded", np.array([-1, *table.rows.shape[2:]], np.int64))
    graph.nodes += [
        gs.Node("Expand", f"{prefix}.expand", inputs=[gathered, size], outputs=[expanded]),
        gs.Node("Reshape", f"{prefix}.fold", inputs=[expanded, folded], outputs=[served]),
    ]
    return served
