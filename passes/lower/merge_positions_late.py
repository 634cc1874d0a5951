"""Turn a map into tokens: first move its channels last, then merge its positions.

    transpose_021(merge(x))  ==  merge(transpose_0231(x))          [N, C, H, W] -> [N, H W, C]
    norm(merge(x))           ==  merge(norm(x))

Attention reads a map as ``transpose(norm(merge(x)))``. Where convolutions keep channels last, [N, H, W, C] is how the
map lies in memory, so this transpose moves nothing. Merging the positions first forces the other layout.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, producer, sole_consumer, variable
from tfmq_export.passes.reading import Shape, known_shape

CHANNELS_LAST = [0, 2, 1]
"""From [N, C, L] to [N, L, C]."""


@dataclass(frozen=True)
class MergePositionsLate(Pass):
    """Reshape, GroupNormalization or none, Transpose -> GroupNormalization or none, Transpose, Reshape."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        found = _sites(graph)
        for site in found:
            site.rewrite(graph)
        return Changes(tuple(site.transpose.name for site in found))

    def ensures(self, graph: gs.Graph) -> None:
        left = [site.transpose.name for site in _sites(graph)]
        if left:
            raise PostconditionError(f"{left[0]}: its positions are still merged in front of it")


@dataclass(frozen=True, eq=False)
class _Site:
    """A map that becomes tokens.

    Attributes:
        image: [N, C, *positions].
        norm: The GroupNormalization of the merged map, which nothing but ``transpose`` reads.
        transpose: To [N, L, C].
    """

    image: gs.Tensor
    norm: gs.Node | None
    transpose: gs.Node

    def rewrite(self, graph: gs.Graph) -> None:
        name, (tokens,) = self.transpose.name, self.transpose.outputs
        turned = self.image
        if self.norm is not None:
            turned = variable(f"{self.norm.name}_apart", self.image.dtype, self.image.shape)
            self.norm.inputs[0] = self.image
            self.norm.outputs = [turned]
        batch, channels, *positions = known_shape(self.image)
        last = variable(f"{name}_apart", tokens.dtype, [batch, *positions, channels])
        self.transpose.inputs = [turned]
        self.transpose.outputs = [last]
        self.transpose.attrs["perm"] = [0, *range(2, 2 + len(positions)), 1]
        merged = constant(f"{name}_merged", np.array([0, -1, channels]))
        graph.nodes.append(gs.Node("Reshape", f"{name}_merge", inputs=[last, merged], outputs=[tokens]))


def _sites(graph: gs.Graph) -> list[_Site]:
    found = [_site(graph, node) for node in graph.nodes if node.op == "Transpose"]
    return [site for site in found if site is not None]


def _site(graph: gs.Graph, transpose: gs.Node) -> _Site | None:
    if transpose.attrs.get("perm") != CHANNELS_LAST:
        return None
    (merged,) = transpose.inputs
    norm = producer(merged, "GroupNormalization")
    if norm is not None:
        if sole_consumer(graph, merged, "Transpose") is None:
            return None
        merged = norm.inputs[0]
    reshape = producer(merged, "Reshape")
    if reshape is None or not _merges_positions(reshape.inputs[0].shape, merged.shape):
        return None
    return _Site(reshape.inputs[0], norm, transpose)


def _merges_positions(before: Shape | None, after: Shape | None) -> bool:
    """Whether [N, C, *positions], at least two of them, becomes [N, C, L]."""
    if before is None or after is None or len(before) < 4 or len(after) != 3:
        return False
    return list(before[:2]) == list(after[:2]) and isinstance(before[1], int)
