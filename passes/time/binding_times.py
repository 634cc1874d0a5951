"""Binding times: which inputs' data each value of the graph depends on.

Sorted by how often they change, inputs bind at compile time (weights), per timestep, per prompt or
per sample. A shape query reads no data, so a timestep expanded to the batch of the sample still
depends on the timestep alone.
"""

from collections.abc import Iterator, Mapping
from enum import Enum

import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError

SHAPE_QUERIES = frozenset({"Shape", "Size"})
SAMPLE, TIMESTEP, CONDITIONING = "sample", "timestep", "conditioning"


class BindingTime(Enum):
    """When the numbers of a value are known, by the roles of the inputs it reads."""

    WEIGHTS = "weights"
    """At compile time; sizes of axes count as known, too."""
    TIMESTEP = "timestep"
    PROMPT = "prompt"
    PROMPT_AND_TIMESTEP = "prompt and timestep"
    SAMPLE = "sample"


_TIMES: Mapping[frozenset[str], BindingTime] = {
    frozenset(): BindingTime.WEIGHTS,
    frozenset({TIMESTEP}): BindingTime.TIMESTEP,
    frozenset({CONDITIONING}): BindingTime.PROMPT,
    frozenset({CONDITIONING, TIMESTEP}): BindingTime.PROMPT_AND_TIMESTEP,
}


def classify_values(graph: gs.Graph, roles: Mapping[str, str]) -> dict[str, BindingTime]:
    """When each value binds, by value name. The graph must be sorted.

    Args:
        roles: "sample", "timestep" or "conditioning" for each graph input.
    Raises:
        PreconditionError: an input has none of these roles.
    """
    for value in graph.inputs:
        if roles.get(value.name) not in (SAMPLE, TIMESTEP, CONDITIONING):
            known = ", ".join(f"{name}: {role}" for name, role in sorted(roles.items())) or "nothing"
            raise PreconditionError(
                f"input {value.name!r} needs the role sample, timestep or conditioning; given {known}"
            )
    return {
        name: _TIMES.get(frozenset(roles[source] for source in sources), BindingTime.SAMPLE)
        for name, sources in binding_times(graph).items()
    }


def binding_times(graph: gs.Graph) -> dict[str, frozenset[str]]:
    """Names of the graph inputs each value depends on, by value name. The graph must be sorted."""
    depends = {value.name: frozenset({value.name}) for value in graph.inputs}
    for node in graph.nodes:
        sources = frozenset[str]()
        if node.op not in SHAPE_QUERIES:
            sources = sources.union(*(depends.get(value.name, frozenset()) for value in read_by(node)))
        for value in node.outputs:
            depends[value.name] = sources
    return depends


def read_by(node: gs.Node) -> Iterator[gs.Tensor]:
    """Every value a node reads, those its subgraphs capture included."""
    yield from node.inputs
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for inner in attribute.nodes:
                yield from read_by(inner)
