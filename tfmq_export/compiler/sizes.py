"""How large what is written will be, worked out from the captured graph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from tfmq_export.capture.blocks import Block, constant_nodes
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rows import elements_for_one
from tfmq_export.compiler.component_sizes import components_bytes
from tfmq_export.config import CompileConfig
from tfmq_export.ptq.walk.calibrated_model import QuantPlan

FLOAT = 4  # bytes
NODE_BYTES, GRID_BYTES = 110, 100
"""Of the graph's text, for each node of the captured one; with grids it becomes several."""
GRIDS = 3  # float32 or integer numbers for each output channel: scale, bias, sum for the zero point
BESIDES = 2 << 20  # report, pictures and manifest
ROW_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes, but for the last two.

    Attributes:
        model: Of the graph's files, tables included.
        recipe: Of what a later run can start from.
        components: Of a pipeline's other components, where they are copied or written as ONNX.
        call: Of the inputs and the prediction of one row, as calibration records them.
        weights: Numbers in the layers that are quantized, or all where none is.
        layers: To be quantized.
    """

    model: int
    recipe: int
    components: int
    call: int
    weights: int
    layers: int

    @property
    def output(self) -> int:
        """All files of the bundle together."""
        return self.model + self.recipe + self.components + BESIDES


def sizes_of(
    program: DiffusionProgram, blocks: Sequence[Block], denoiser: Denoiser, plan: QuantPlan, config: CompileConfig
) -> Sizes:
    """Count what the graph holds.

    Args:
        blocks: From ``blocks_of``: what only served values need is left out.
    """
    graph = program.module.graph
    nodes = {node.name: node for node in graph.nodes}
    layers = {op.name: op for op in program.operations}
    weights = {name: math.prod(nodes[op.weight].meta["val"].shape) for name, op in layers.items()}
    outputs = sum(nodes[op.weight].meta["val"].shape[0] for op in layers.values())
    served = [feature.name for feature in program.features]
    constant = constant_nodes(graph)
    inside = {nodes[name] for block in blocks for name in block.nodes}  # what served values need is left out
    needed = {source for node in inside for source in node.all_input_nodes if source in constant}
    taken = {op.weight for op in layers.values()}
    other = sum(_elements(node) for node in needed if node.name not in taken)
    steps = len(denoiser.timesteps)
    rows = sum(elements_for_one(nodes[name]) for name in served) * steps
    bits = plan.weight_bits or 8 * FLOAT
    codes = sum(weights.values()) * bits // 8
    grids = outputs * GRIDS * FLOAT if plan.weight_bits else 0
    text = (NODE_BYTES + (GRID_BYTES if plan.weight_bits else 0)) * len(nodes)
    rows_of_one = [value[:1] if value.ndim else value for value in denoiser.example_inputs.values()]
    inputs = sum(value.numel() * value.element_size() for value in rows_of_one)
    sample = denoiser.example_inputs[denoiser.sample][:1]
    return Sizes(
        model=codes + grids + other * FLOAT + rows * ROW_BYTES[config.tables] + text,
        recipe=(codes if plan.weight_bits else 0) + grids + rows * FLOAT,
        components=components_bytes(denoiser, config.components, decoder=config.decoder),
        call=inputs + sample.numel() * FLOAT,
        weights=sum(weights.values()) or other,
        layers=len(layers) if plan.weight_bits else 0,
    )


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, Tensor) and value.dtype.is_floating_point else 0
