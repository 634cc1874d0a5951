"""Correct the prediction by the recipe's row for the timestep.

    out  ==  K(t) e + L(t) x + b(t)          per channel

with the prediction ``e`` and the sample ``x`` as the graph reads it. The rows lie beside the temporal tables and are
found by the same lookup.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.graph import constant, variable
from tfmq_export.recipe.names import ROWS, lookup_name

TERMS = ("gain", "sample", "offset")


@dataclass(frozen=True)
class CorrectPrediction(RecipePass):
    """Put the affine map on the output.

    Attributes:
        sample: Name of the input that holds the noisy sample.
    """

    sample: str
    semantics: ClassVar[Semantics] = Semantics.CORRECTING

    def requires(self, graph: gs.Graph) -> None:
        if len(graph.outputs) != 1:
            raise PreconditionError(f"expected one output, the graph has {len(graph.outputs)}")
        values = graph.tensors()
        if self.sample not in values or not values[self.sample].shape:
            raise PreconditionError(f"the graph has no input {self.sample!r} of a known rank")
        if ROWS not in values:
            raise PreconditionError(
                "nothing looks the timestep up, so the correction has no row to take; quantize again with "
                "closed_loop = false in [method]"
            )

    def apply(self, graph: gs.Graph) -> Changes:
        correction = self.recipe.correction
        if correction is None:
            return Changes(skipped=(("prediction", "the recipe corrects nothing"),))
        values = graph.tensors()
        sample, rows, (prediction,) = values[self.sample], values[ROWS], graph.outputs
        channels = (correction.rows.shape[2], *[1] * (len(sample.shape or ()) - 2))
        served = []
        for place, term in enumerate(TERMS):
            name = lookup_name(f"correction.{term}")
            table = np.ascontiguousarray(correction.rows[:, place]).reshape(-1, *channels)
            row = variable(f"{name}.row", np.float32)
            graph.nodes.append(gs.Node("Gather", name, {"axis": 0}, [constant(f"{name}.rows", table), rows], [row]))
            served.append(row)
        gain, share, offset = served
        scaled, shared, partial = (variable(f"prediction.{name}", np.float32) for name in ("scaled", "shared", "sum"))
        result = variable("prediction.corrected", np.float32, prediction.shape)
        graph.nodes += [
            gs.Node("Mul", "prediction.scale", inputs=[prediction, gain], outputs=[scaled]),
            gs.Node("Mul", "prediction.share", inputs=[sample, share], outputs=[shared]),
            gs.Node("Add", "prediction.add", inputs=[scaled, shared], outputs=[partial]),
            gs.Node("Add", "prediction.offset", inputs=[partial, offset], outputs=[result]),
        ]
        graph.outputs = [result]
        return Changes((prediction.name,))
