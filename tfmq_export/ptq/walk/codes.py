"""Tensors that take several 8-bit codes, where 256 levels are the largest error and more of them cost next to nothing.

Several codes are more channels of one convolution (``passes/qdq/offset_inputs.py``, ``stack_output_codes.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from tfmq_export.capture.dependences import SAMPLE, Operation
from tfmq_export.capture.program import DiffusionProgram

CODE_BITS = 8
EXTRA_MACS = 0.04
"""Share of the model's multiply-accumulates that second codes of outputs may add, all layers together."""


@dataclass(frozen=True, slots=True)
class Codes:
    """How many 8-bit codes a layer's tensors have.

    Attributes:
        input: Of what it reads.
        output: Of what it returns, where the target wants that on a grid.
        at_8_bits: Whether weights and inputs have 8 bits where the preset says fewer.
    """

    input: int = 1
    output: int = 1
    at_8_bits: bool = False

    def input_bits(self, preset: int) -> int:
        """Bits of what the layer reads, where the preset says so many."""
        if self.input > 1:
            return CODE_BITS
        return max(CODE_BITS, preset) if self.at_8_bits else preset


PLAIN = Codes()
FIRST, LAST = Codes(8, 2, at_8_bits=True), Codes(4, 16, at_8_bits=True)
"""Of the sample and of the noise prediction, which no step of the sampler averages away."""
FINE = Codes(1, 2, at_8_bits=True)
"""Of 1 x 1 convolutions at the sample's own size: shortcuts of the last blocks. What they write goes to the prediction
past all that follows, and nothing averages it."""


def codes_of(program: DiffusionProgram) -> Mapping[str, Codes]:
    """The layers that take several codes, by the value they compute; of fine ones the last, as many as are cheap.

    Args:
        program: With its skip concatenations split.
    """
    on_sample = [op for op in program.operations if SAMPLE in op.roles]
    if not on_sample:
        return {}
    first, *between, last = on_sample if len(on_sample) > 1 else [*on_sample, *on_sample]
    nodes = {node.name: node for node in program.module.graph.nodes}
    size = next(_size(nodes[name]) for name, role in program.roles.items() if role == SAMPLE)
    room = EXTRA_MACS * program.macs - FIRST.input * first.macs
    found = {first.name: FIRST if room >= 0 else replace(FIRST, output=1), last.name: LAST}
    for op in reversed(between):
        if op.macs <= room and _is_pointwise(op, nodes, size):
            found[op.name] = FINE
            room -= op.macs
    return found


def _is_pointwise(op: Operation, nodes: Mapping[str, fx.Node], size: tuple[object, ...]) -> bool:
    kernel = nodes[op.weight].meta["val"].shape[2:]
    return op.kind == "conv" and op.groups == 1 and kernel.numel() == 1 and _size(nodes[op.name]) == size


def _size(node: fx.Node) -> tuple[object, ...]:
    """Height and width, and frames where there are any."""
    return tuple(node.meta["val"].shape[2:])
