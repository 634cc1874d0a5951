"""The float twin of a quantized graph: the baseline its speed is measured against.

Weights are dequantized and activations flow unquantized; every other node stays as it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant

THROUGH = ("Cast", "Clip")


@dataclass(frozen=True)
class StripQdq(Pass):
    """Remove every QuantizeLinear, Clip and DequantizeLinear that ``InsertQdq`` and ``QuantizeWeights`` put in."""

    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def apply(self, graph: gs.Graph) -> Changes:
        changed = []
        for node in [node for node in graph.nodes if node.op == "DequantizeLinear"]:
            codes = _origin(node.inputs[0])
            if isinstance(codes, gs.Constant):
                axis = node.attrs.get("axis", 1)
                twin: gs.Tensor = constant(f"{node.name}.float", _dequantize(codes, node.inputs[1], axis))
            else:
                twin = codes.inputs[0].inputs[0]
            (real,) = node.outputs
            for reader in list(real.outputs):
                for position, value in enumerate(reader.inputs):
                    if value is real:
                        reader.inputs[position] = twin
            if real in graph.outputs:
                # The output keeps its name: the node that computed the unquantized value writes it.
                twin.inputs[0].outputs = [real]
                node.outputs.clear()
            changed.append(node.name)
        return Changes(tuple(changed))

    def ensures(self, graph: gs.Graph) -> None:
        left = [node.name for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")]
        if left:
            raise PostconditionError(f"{left[0]} is still there")


def _origin(value: gs.Tensor) -> gs.Tensor:
    """The stored integers, or the output of the QuantizeLinear, behind clips and casts."""
    while value.inputs and value.inputs[0].op in THROUGH:
        value = value.inputs[0].inputs[0]
    return value


def _dequantize(codes: gs.Constant, scale: gs.Constant, axis: int) -> NDArray[np.float32]:
    values = np.asarray(codes.values).astype(np.float32)
    steps = np.asarray(scale.values, np.float32)
    if steps.ndim:
        steps = steps.reshape([-1 if position == axis % values.ndim else 1 for position in range(values.ndim)])
    return values * steps
