"""Give the graph's output its public name."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics


@dataclass(frozen=True)
class NameOutputs(Pass):
    """Rename the one output; until here it carried the name of the layer that computes it."""

    name: str
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        if len(graph.outputs) != 1:
            raise PreconditionError(f"expected one output, the graph has {len(graph.outputs)}")

    def apply(self, graph: gs.Graph) -> Changes:
        (output,) = graph.outputs
        before = output.name
        output.name = self.name
        return Changes((f"{before} -> {self.name}",) if before != self.name else ())
