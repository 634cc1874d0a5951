"""Tensors that take several 8-bit codes, where 256 levels are the largest error and more of them cost next to nothing.

Several codes are more channels of one convolution (``passes/qdq/offset_inputs.py``, ``stack_output_codes.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from tfmq_export.capture.dependences import SAMPLE, Operation
from tfmq_export.capture.program import DiffusionProgram

CODE_BITS = 8
MOST_MACS = 0.01
"""Share of the model's multiply-accumulates that a layer with several codes of its own may have."""


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
    """The layers that take several codes, by the value they compute.

    Args:
        program: With its skip concatenations split.
    """
    nodes = {node.name: node for node in program.module.graph.nodes}
    on_sample = [op for op in program.operations if SAMPLE in op.roles]
    if not on_sample:
        return {}
    size = next(_size(nodes[name]) for name, role in program.roles.items() if role == SAMPLE)
    found = {op.name: FINE for op in on_sample if _is_cheap(op, program) and _is_pointwise(op, nodes, size)}
    return found | {on_sample[0].name: FIRST, on_sample[-1].name: LAST}


def _is_cheap(op: Operation, program: DiffusionProgram) -> bool:
    return op.macs <= MOST_MACS * program.macs


def _is_pointwise(op: Operation, nodes: Mapping[str, fx.Node], size: tuple[object, ...]) -> bool:
    kernel = nodes[op.weight].meta["val"].shape[2:]
    return op.kind == "conv" and op.groups == 1 and kernel.numel() == 1 and _size(nodes[op.name]) == size


def _size(node: fx.Node) -> tuple[object, ...]:
    """Height and width, and frames where there are any."""
    return tuple(node.meta["val"].shape[2:])
