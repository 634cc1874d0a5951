"""Fold what depends on weights only: weight-standardised kernels, transposed weights, shape arithmetic."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.passes.base import Changes, Pass, Semantics


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at compile time whatever no graph input reaches (graphsurgeon's folding, through ONNX Runtime)."""

    semantics: ClassVar[Semantics] = Semantics.EXACT

    def apply(self, graph: gs.Graph) -> Changes:
        before = [node.name for node in graph.nodes]
        graph.fold_constants(fold_shapes=True).cleanup()
        left = {node.name for node in graph.nodes}
        return Changes(tuple(name for name in before if name not in left))
