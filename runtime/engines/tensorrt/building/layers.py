"""What TensorRT says about the layers of an engine, read from its detailed build log.

Ahead of time, without a GPU, this list is the only account there is: the engine itself cannot be opened. One line per
layer, with the types it reads, keeps and writes, and the ONNX nodes it came from:

    Name: node_conv2d_myl0_2, LayerType: correlation, Inputs: [ { Name: ..., Datatype: Int8, ... }],
    Constants: [...], Outputs: [...], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: node_conv2d][...]
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, StreamId: \d+, Metadata: (?P<metadata>.*)$"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")

POINTWISE = frozenset({"kgen", "shape_call", "runtime_function"})
"""Generated kernels: scaling, rounding, activations, normalization, fused attention."""

DEQUANTIZING = frozenset({"runtime_fusion"})
"""Read integer weights, and integer activations at times, and multiply in floating point."""


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        kind: As TensorRT calls it, such as "correlation", "gemm" or "kgen".
        inputs: Types of what it reads, such as "Int8" or "Half".
        constants: Types of the weights and scales it keeps.
        outputs: Types of what it writes.
        nodes: The ONNX nodes it computes, or part of them.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def computes(self) -> bool:
        """Whether it multiplies matrices or convolves: what a quantized layer is asked to do in integers."""
        return self.kind not in POINTWISE

    @property
    def type(self) -> str:
        """Of its arithmetic: "Int8" where both operands are, else what it computes in."""
        if self.kind in DEQUANTIZING:
            return self.outputs[0] if self.outputs else ""
        operands = self.inputs + self.constants
        if self.inputs[:1] == ("Int8",) and operands.count("Int8") >= 2:
            return "Int8"
        return next((each for each in operands if each != "Int8"), "")


def parse_layers(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers listed in a build log; empty where it lists none."""
    return tuple(layer for message in messages for layer in _layers(message))


def _layers(message: str) -> Iterator[EngineLayer]:
    for line in message.splitlines():
        found = _LAYER.match(line)
        if found is not None:
            types = {part: tuple(_TYPE.findall(found[part])) for part in ("inputs", "constants", "outputs")}
            yield EngineLayer(found["name"], found["kind"], **types, nodes=tuple(_NODE.findall(found["metadata"])))
