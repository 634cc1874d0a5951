"""Binding times: which inputs' data each value of the graph depends on.

Sorted by how often they change, inputs bind at compile time (weights), per timestep, per prompt or
per sample. A shape query reads no data, so a timestep expanded to the batch of the sample still
depends on the timestep alone.
"""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

SHAPE_QUERIES = frozenset({"Shape", "Size"})


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
