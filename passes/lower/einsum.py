"""Write a sum over no index as what it is.

    einsum("nhwpqc->nchpwq", x)  ==  transpose(x, [0, 5, 1, 3, 2, 4])

Transformers put their patches back into an image by it. Engines fuse a Transpose, and not all of them have an Einsum.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics


@dataclass(frozen=True)
class EinsumAsTranspose(Pass):
    """Einsum of one operand that keeps every index -> Transpose."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        found = _sites(graph)
        for node, permutation in found:
            node.op, node.attrs = "Transpose", {"perm": permutation}
        return Changes(tuple(node.name for node, _ in found))

    def ensures(self, graph: gs.Graph) -> None:
        for node, _ in _sites(graph):
            raise PostconditionError(f"{node.name}: still an Einsum")


def _sites(graph: gs.Graph) -> list[tuple[gs.Node, list[int]]]:
    """Each Einsum that only moves axes, with the axis of its operand that each axis of its result is."""
    found = []
    for node in graph.nodes:
        if node.op == "Einsum" and len(node.inputs) == 1:
            permutation = _permutation(str(node.attrs["equation"]))
            if permutation is not None:
                found.append((node, permutation))
    return found


def _permutation(equation: str) -> list[int] | None:
    """None where an index is summed over, repeated (a diagonal) or left open ("...")."""
    given, arrow, wanted = equation.replace(" ", "").partition("->")
    if not arrow:
        wanted = "".join(sorted(given))  # as einsum orders what it is not told
    if "." in given or len(set(given)) < len(given) or sorted(given) != sorted(wanted):
        return None
    return [given.index(index) for index in wanted]
