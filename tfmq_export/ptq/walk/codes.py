"""Tensors that take several 8-bit codes, or 8 bits where the preset says fewer: where that costs next to nothing.

Several codes are more channels of one convolution (``passes/qdq/offset_inputs.py``, ``stack_output_codes.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from tfmq_export.capture.dependences import SAMPLE
from tfmq_export.capture.program import DiffusionProgram

CODE_BITS = 8
EXTRA_MACS = 0.04
"""Share of the model's multiply-accumulates that second codes of outputs may add, all layers together."""
EXTRA_WEIGHTS = 0.04
"""Share of the model's weights that may have 8 bits for their place alone, all layers together."""


@dataclass(frozen=True, slots=True)
class Codes:
    """How many 8-bit codes a layer's tensors have.

    Attributes:
        input: Of what it reads.
        output: Of what it returns, where the target wants that on a grid.
        least_weight_bits: Of the weight, where the preset says fewer.
        least_input_bits: Of what it reads.
    """

    input: int = 1
    output: int = 1
    least_weight_bits: int = 0
    least_input_bits: int = 0

    def weight_bits(self, preset: int) -> int:
        """Bits of the weight, where the preset says so many."""
        return max(self.least_weight_bits, preset)

    def input_bits(self, preset: int) -> int:
        """Bits of what the layer reads, where the preset says so many."""
        return CODE_BITS if self.input > 1 else max(self.least_input_bits, preset)


PLAIN = Codes()
FIRST, LAST = Codes(8, 2, CODE_BITS, CODE_BITS), Codes(4, 16, CODE_BITS, CODE_BITS)
"""Of the sample and of the noise prediction, which no step of the sampler averages away."""
FINE = Codes(1, 2, CODE_BITS, CODE_BITS)
"""Of 1 x 1 convolutions at the sample's own size: shortcuts of the last blocks. What they write goes to the prediction
past all that follows, and nothing averages it."""
SHARP = Codes(least_weight_bits=CODE_BITS)
"""Of other convolutions at the sample's own size: a few percent of the weights, and the largest part of their error."""


def codes_of(program: DiffusionProgram, *, sharp: bool = True) -> Mapping[str, Codes]:
    """The layers with other codes than the preset's, by the value they compute; of each kind the last, while cheap.

    Args:
        program: With its skip concatenations split.
        sharp: Whether there are sharp layers among them.
    """
    on_sample = [op for op in program.operations if SAMPLE in op.roles]
    if not on_sample:
        return {}
    first, *between, last = on_sample if len(on_sample) > 1 else [*on_sample, *on_sample]
    nodes = {node.name: node for node in program.module.graph.nodes}
    size = next(_size(nodes[name]) for name, role in program.roles.items() if role == SAMPLE)
    kernels = {op.name: nodes[op.weight].meta["val"].shape for op in on_sample}
    here = [op for op in between if op.kind == "conv" and op.groups == 1 and _size(nodes[op.name]) == size]
    macs = EXTRA_MACS * program.macs - FIRST.input * first.macs
    found = {first.name: FIRST if macs >= 0 else replace(FIRST, output=1), last.name: LAST}
    pointwise = {op.name: op.macs for op in here if kernels[op.name][2:].numel() == 1}
    found |= dict.fromkeys(_last_within(pointwise, macs), FINE)
    if not sharp:
        return found
    others = {op.name: kernels[op.name].numel() for op in here if op.name not in found}
    weights = EXTRA_WEIGHTS * sum(shape.numel() for shape in kernels.values())
    return found | dict.fromkeys(_last_within(others, weights), SHARP)


def _last_within(costs: Mapping[str, int], room: float) -> list[str]:
    """From the end, what the room has space for; what is too large for it is left out."""
    taken = []
    for name, cost in reversed([*costs.items()]):
        if cost <= room:
            taken.append(name)
            room -= cost
    return taken


def _size(node: fx.Node) -> tuple[object, ...]:
    """Height and width, and frames where there are any."""
    return tuple(node.meta["val"].shape[2:])
