"""Cut a graph in two: one part runs once per prompt, the other at every step.

    graph(sample, t, prompt)  ==  main(sample, t, prologue(prompt))

Values of the prompt alone come back as they are, [N, ...]. Values of prompt and timestep come back as
tables over the whole schedule, [T, N, ...]; the main graph gathers the row of its timestep, or of each
sample's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.bundle.manifest import PassedTensor
from tfmq_export.errors import PreconditionError
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.graph_file import check_valid
from tfmq_export.passes.reading import element_type, known_shape, sizes_per_sample
from tfmq_export.passes.time.binding_times import SAMPLE, TIMESTEP
from tfmq_export.passes.time.prologue_frontier import Frontier, find_frontier
from tfmq_export.passes.time.prologue_graph import is_table, prologue_of
from tfmq_export.passes.time.tabulate_tib import computed_from_time
from tfmq_export.recipe.names import ROWS, gather_name, lookup_name, table_name


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Both graphs.

    Attributes:
        main: Takes sample, timestep, ``passed``, and whatever conditioning it still reads itself.
        prologue: Takes conditioning, returns ``passed``.
        moved: Names of the nodes that the main graph no longer has.
        kept: Products of the prompt that stay in the main graph, with the reasons.
    """

    main: gs.Graph
    prologue: gs.Graph
    passed: tuple[PassedTensor, ...]
    moved: frozenset[str]
    kept: tuple[tuple[str, str], ...]


def split_prologue(graph: gs.Graph, roles: Mapping[str, str], steps: int) -> Split:
    """Split a finished graph; the graph itself is left as it is.

    Args:
        roles: "sample", "timestep" or "conditioning" for each graph input.
        steps: Timesteps of the schedule, T.
    Raises:
        PreconditionError: nothing to move, or values of the timestep that ``TabulateTib`` has not served.
        PostconditionError: a half is not valid ONNX.
    """
    for name in (name for name, role in roles.items() if role == TIMESTEP):
        if strays := computed_from_time(graph, name):
            raise PreconditionError(f"{strays[0]} computes from {name!r}; run TabulateTib first")
    frontier = find_frontier(graph, roles, steps)
    if not frontier.passed:
        kept = "".join(f"; {name}: {reason}" for name, reason in frontier.kept[:1])
        raise PreconditionError(
            f"nothing in this graph is computed from the prompt alone{kept}; leave the prologue out"
        )
    prologue = prologue_of(graph, frontier, roles, steps)
    main = _main_of(graph, frontier, roles, steps)
    for half in (main, prologue):
        check_valid(half)
    return Split(
        main,
        prologue,
        tuple(_passed(value, frontier) for value in frontier.passed),
        frozenset(node.name for node in graph.nodes) - frozenset(node.name for node in main.nodes),
        frontier.kept,
    )


def _passed(value: gs.Tensor, frontier: Frontier) -> PassedTensor:
    table = is_table(value, frontier)
    name = table_name(value.name) if table else value.name
    return PassedTensor(name, element_type(value).name, sizes_per_sample(value), table)


def take_over(value: gs.Tensor) -> gs.Variable:
    """Cut a value off from the node that computes it, so that another may."""
    (node,) = value.inputs
    position = next(at for at, output in enumerate(node.outputs) if output is value)
    taken = node.outputs[position]
    node.outputs[position] = variable(f"{value.name}.moved")  # other outputs keep their places
    return taken


def _main_of(graph: gs.Graph, frontier: Frontier, roles: Mapping[str, str], steps: int) -> gs.Graph:
    """The graph with every passed value as an input, or as a row of one."""
    main = graph.copy()
    values = main.tensors()
    (sample,) = (value for value in main.inputs if roles[value.name] == SAMPLE)
    index: gs.Variable | None = None
    for value in frontier.passed:
        taken = take_over(values[value.name])
        if not is_table(value, frontier):
            main.inputs.append(taken)
            continue
        index = index or row_and_column(main, values[ROWS], sample)
        table = variable(table_name(value.name), dtype=value.dtype, shape=(steps, *known_shape(value)))
        main.inputs.append(table)
        main.nodes.append(gs.Node("GatherND", gather_name(value.name), inputs=[table, index], outputs=[taken]))
    main.cleanup(remove_unused_graph_inputs=True).toposort()
    return main


def row_and_column(
    main: gs.Graph,
    rows: gs.Tensor,
    sample: gs.Tensor,
    labels: gs.Tensor | None = None,
    *,
    prefix: str = lookup_name("prompt"),
) -> gs.Variable:
    """Where each sample finds its numbers in a table: [row of its timestep, column], int64 [N, 2].

    Args:
        labels: The column of each sample, int64 [N]; None for its own number in the batch.
        prefix: Of the names of new values and nodes.
    """

    def emit(op: str, name: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        output = variable(f"{prefix}.{name}", dtype=np.int64)
        main.nodes.append(gs.Node(op, f"{prefix}.compute_{name}", attrs, inputs, [output]))
        return output

    last = constant(f"{prefix}.last_axis", np.array([1], np.int64))
    batch = emit("Shape", "batch", [sample], start=0, end=1)
    if labels is None:
        bounds = [
            constant(f"{prefix}.{name}", np.array(number, np.int64)) for name, number in (("zero", 0), ("one", 1))
        ]
        labels = emit("Range", "samples", [bounds[0], emit("Squeeze", "count", [batch]), bounds[1]])
    row = emit("Unsqueeze", "row_column", [emit("Expand", "row", [rows, batch]), last])
    column = emit("Unsqueeze", "sample_column", [labels, last])
    return emit("Concat", "index", [row, column], axis=1)
