"""Build the prologue: copy the nodes that the passed values need into a graph that reads only the conditioning.

Values of the prompt are computed for N prompts. Values of prompt and timestep are computed as one batch
of T * N samples that each bring their own timestep, which the graph takes anyway: so every node is the
node of the single graph, and prompt n at timestep t is sample t * N + n.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import ElementType, known_shape, sizes_per_sample
from tfmq_export.passes.time.binding_times import CONDITIONING, BindingTime, binding_times
from tfmq_export.passes.time.prologue_frontier import Frontier, passable, queries_batch
from tfmq_export.recipe.names import ROWS, table_name


def prologue_of(graph: gs.Graph, frontier: Frontier, roles: Mapping[str, str], steps: int) -> gs.Graph:
    """The graph that computes the frontier's values from conditioning alone."""
    return _Prologue(graph, frontier, roles, steps).build()


def is_table(value: gs.Tensor, frontier: Frontier) -> bool:
    """Whether a value is passed for every timestep of the schedule at once."""
    return frontier.times[value.name] is BindingTime.PROMPT_AND_TIMESTEP


class Region(Enum):
    """How often the prologue evaluates a node."""

    ONCE = "once"
    """For N prompts."""
    PER_STEP = "per step"
    """For T * N samples: prompt n at timestep t is number t * N + n."""


Site = tuple[gs.Node, Region]


class _Prologue:
    """Copies what the passed values need into a graph of its own."""

    def __init__(self, graph: gs.Graph, frontier: Frontier, roles: Mapping[str, str], steps: int) -> None:
        self._source, self._frontier, self._steps = graph, frontier, steps
        self._inputs = {value.name: value for value in graph.inputs if roles[value.name] == CONDITIONING}
        self._nodes: list[gs.Node] = []
        self._values: dict[tuple[str, Region], gs.Tensor] = {}
        self._used: dict[str, gs.Variable] = {}

    def build(self) -> gs.Graph:
        ends = [(value, self._region(value)) for value in self._frontier.passed]
        self._add_inputs()
        needed = self._needed(ends)
        for node in self._source.nodes:
            for region in Region:
                if (id(node), region) in needed:
                    self._copy(node, region)
        outputs = [self._output(value, region) for value, region in ends]
        inputs = list(self._used.values())
        graph = gs.Graph(
            self._nodes,
            inputs,
            outputs,
            name="prologue",
            opset=self._source.opset,
            import_domains=self._source.import_domains,
        )
        return graph.cleanup().toposort()

    def _region(self, value: gs.Tensor) -> Region:
        return Region.PER_STEP if is_table(value, self._frontier) else Region.ONCE

    def _is_tiled(self, value: gs.Tensor, region: Region) -> bool:
        """Whether a value is computed for N prompts and repeated for each timestep."""
        of_prompt = self._frontier.times.get(value.name) is BindingTime.PROMPT
        return region is Region.PER_STEP and of_prompt and passable(value, self._frontier.batch)

    def _needed(self, ends: Sequence[tuple[gs.Tensor, Region]]) -> set[tuple[int, Region]]:
        """The nodes to copy, walking back from the ends."""
        found: set[tuple[int, Region]] = set()
        stack: list[tuple[gs.Tensor, Region]] = [*ends]
        while stack:
            value, region = stack.pop()
            if not value.inputs or value.name == ROWS:
                continue
            if self._is_tiled(value, region):
                region = Region.ONCE
            node = value.inputs[0]
            if (id(node), region) not in found:
                found.add((id(node), region))
                if not self._asks_for_batch(node):
                    stack.extend((source, region) for source in node.inputs)
        return found

    def _asks_for_batch(self, node: gs.Node) -> bool:
        of_sample = self._frontier.times.get(node.inputs[0].name) is BindingTime.SAMPLE if node.inputs else False
        return of_sample and queries_batch(node, self._frontier.batch)

    def _add_inputs(self) -> None:
        depends = binding_times(self._source)
        read = {name for value in self._frontier.passed for name in depends[value.name]}
        for name, value in self._inputs.items():
            if name in read:
                self._used[name] = variable(name, dtype=value.dtype, shape=value.shape)
                self._values[name, Region.ONCE] = self._used[name]

    def _copy(self, node: gs.Node, region: Region) -> None:
        own = all(self._region(value) is region for value in node.outputs)
        suffix = "" if own else ".steps"
        outputs = []
        for value in node.outputs:
            shape = value.shape
            if region is Region.PER_STEP and shape and shape[0] == self._frontier.batch:
                shape = ("samples", *shape[1:])
            outputs.append(variable(f"{value.name}{suffix}", dtype=value.dtype, shape=shape))
            self._values[value.name, region] = outputs[-1]
        if self._asks_for_batch(node):
            self._nodes.append(gs.Node("Identity", f"{node.name}{suffix}", {}, [self._batch(region)], outputs))
            return
        inputs = [self._read(value, region) for value in node.inputs]
        self._nodes.append(
            gs.Node(node.op, f"{node.name}{suffix}", dict(node.attrs), inputs, outputs, domain=node.domain)
        )

    def _read(self, value: gs.Tensor, region: Region) -> gs.Tensor:
        if isinstance(value, gs.Constant):
            return self._values.setdefault((value.name, Region.ONCE), value.copy())
        if not value.name:
            return gs.Variable.empty()
        if (value.name, region) not in self._values:
            if value.name == ROWS:
                self._values[ROWS, region] = self._rows()
            else:
                self._values[value.name, region] = self._tile(value, self._values[value.name, Region.ONCE])
        return self._values[value.name, region]

    def _emit(
        self, op: str, name: str, inputs: list[gs.Tensor], dtype: ElementType | None, **attrs: object
    ) -> gs.Variable:
        output = variable(name, dtype=dtype)
        self._nodes.append(gs.Node(op, f"{name}.compute", attrs, inputs, [output]))
        return output

    def _batch(self, region: Region) -> gs.Tensor:
        """The batch size of a region, int64 [1]."""
        key = ("prologue.batch", region)
        if key not in self._values:
            if region is Region.ONCE:
                first = next(iter(self._used.values()))
                self._values[key] = self._emit("Shape", "prologue.batch", [first], np.int64, start=0, end=1)
            else:
                steps = constant("prologue.steps", np.array([self._steps], np.int64))
                once = self._batch(Region.ONCE)
                self._values[key] = self._emit("Mul", "prologue.samples", [once, steps], np.int64)
        return self._values[key]

    def _rows(self) -> gs.Tensor:
        """Row of each sample's timestep, int64 [T * N]."""
        column = constant("prologue.schedule", np.arange(self._steps, dtype=np.int64).reshape(-1, 1))
        once = self._batch(Region.ONCE)
        one = constant("prologue.one_row", np.array([1], np.int64))
        size = self._emit("Concat", "prologue.rows_size", [one, once], np.int64, axis=0)
        grid = self._emit("Expand", "prologue.rows_grid", [column, size], np.int64)
        flat = constant("prologue.flat", np.array([-1], np.int64))
        return self._emit("Reshape", "prologue.rows", [grid, flat], np.int64)

    def _tile(self, value: gs.Tensor, once: gs.Tensor) -> gs.Tensor:
        """[N, ...] once for every timestep, [T * N, ...]; the sizes behind the batch stay known to the engine."""
        shape = known_shape(value)
        times = constant(f"{value.name}.repeats", np.array([self._steps] + [1] * (len(shape) - 1), np.int64))
        tiled = self._emit("Tile", f"{value.name}.tiled", [once, times], value.dtype)
        tiled.shape = ("samples", *shape[1:])
        return tiled

    def _output(self, value: gs.Tensor, region: Region) -> gs.Tensor:
        result = self._values[value.name, region]
        if region is Region.ONCE:
            return result
        sizes = sizes_per_sample(value)
        target = constant(f"{value.name}.table_shape", np.array([self._steps, -1, *sizes], np.int64))
        table = self._emit("Reshape", table_name(value.name), [result, target], value.dtype)
        table.shape = (self._steps, self._frontier.batch, *sizes)
        return table
