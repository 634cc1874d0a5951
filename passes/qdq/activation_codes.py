"""How an activation's quantization grid fits the 8-bit integers of a target.

    uint8    any grid of up to 8 bits, with its own zero point
    int8     zero point 0; a grid of 7 bits and fewer sits there as the interval [qmin - z, qmax - z]
    uint16   any grid of 16 bits; a signed one has the middle as its zero point

An 8-bit grid with a zero point on a target that has none, or a grid of several 8-bit values, does not fit:
``OffsetInputs`` lowers it. A grid per timestep is for ``LowerTimestepGrids``.
"""

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.passes.graph import constant, producer, variable
from tfmq_export.recipe.grid import WIDE, QParams
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target

CODE_LEVELS = 255
"""Steps that one 8-bit code resolves."""


def code_type(target: Target) -> type[np.uint8] | type[np.int8]:
    """Type of a target's activation codes."""
    return np.int8 if target.symmetric else np.uint8


def stored_type(grid: QParams, target: Target) -> type[np.uint8] | type[np.int8] | type[np.uint16]:
    """Type of a grid's codes. A signed grid of 8 bits has int8 codes on every target."""
    if grid.spec.bits == WIDE:
        return np.uint16
    return np.int8 if grid.spec.signed else code_type(target)


def fits(layer: LayerRecipe, target: Target) -> bool:
    """Whether one code holds the grid of a layer's input, at every timestep."""
    if layer.input.spec.codes > 1 or layer.input_by_timestep is not None:
        return False
    lowest, highest = _interval(layer.input, target)
    container = np.iinfo(stored_type(layer.input, target))
    return bool(container.min <= lowest and highest <= container.max)


def is_dequantized(value: gs.Tensor, *, turned: bool = False) -> bool:
    """Whether a value comes straight out of a DequantizeLinear, or ``turned`` by one Transpose behind it."""
    transpose = producer(value, "Transpose") if turned else None
    origin = value if transpose is None else transpose.inputs[0]
    return producer(origin, "DequantizeLinear") is not None


def reads_dequantized(node: gs.Node) -> bool:
    """Whether a layer's input is quantized already."""
    return is_dequantized(node.inputs[0])


def grid_constants(scale: np.ndarray, zero_point: int, codes: type[np.integer], prefix: str) -> list[gs.Constant]:
    """Scale and zero point of a per-tensor grid. Rank 0: a [1]-shaped scale loses int8 on TensorRT."""
    return [
        constant(f"{prefix}.scale", np.asarray(scale, np.float32)),
        constant(f"{prefix}.zero_point", np.asarray(zero_point, codes)),
    ]


def quantize_dequantize(graph: gs.Graph, source: gs.Tensor, grid: QParams, target: Target, prefix: str) -> gs.Variable:
    """``Quantize -> Clip -> Dequantize`` of a grid that ``fits``; the Clip only where the codes are narrower.

    QuantizeLinear saturates at 8 bits only. Signed engines, and those that have no arithmetic on codes, want nothing
    between Q and DQ, so there the Clip is in front, on real numbers.
    """
    lowest, highest = _interval(grid, target)
    stored = stored_type(grid, target)
    container = np.iinfo(stored)
    narrow = (lowest, highest) != (container.min, container.max)
    in_front = target.symmetric or target.integers_only
    if narrow and in_front:
        ends = np.array([grid.spec.qmin, grid.spec.qmax], np.float32) - np.float32(grid.zero_point)
        source = clip(graph, source, ends * grid.scale, f"{prefix}.limits")
    constants = grid_constants(grid.scale, int(grid.zero_point) + _shift(grid, target), stored, prefix)
    codes = variable(f"{prefix}.codes", dtype=stored, shape=source.shape)
    graph.nodes.append(gs.Node("QuantizeLinear", f"{prefix}.quantize", inputs=[source, *constants], outputs=[codes]))
    if narrow and not in_front:
        codes = clip(graph, codes, np.array([lowest, highest], stored), f"{prefix}.clip")
    real = variable(f"{prefix}.dequantized", dtype=np.float32, shape=source.shape)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{prefix}.dequantize", inputs=[codes, *constants], outputs=[real]))
    return real


def _interval(grid: QParams, target: Target) -> tuple[int, int]:
    """Lowest and highest code of the grid in the target's numbering."""
    shift = _shift(grid, target)
    return grid.spec.qmin + shift, grid.spec.qmax + shift


def _shift(grid: QParams, target: Target) -> int:
    """What the target's numbering adds to a code."""
    if target.symmetric:
        return -int(grid.zero_point)
    return 1 << (WIDE - 1) if grid.spec.signed and grid.spec.bits == WIDE else 0


def clip(graph: gs.Graph, value: gs.Tensor, limits: np.ndarray, name: str) -> gs.Variable:
    """Bound a value by two constants of its own type."""
    bounds = [constant(f"{name}.{side}", limit) for side, limit in zip(("low", "high"), limits, strict=True)]
    clipped = variable(f"{name}.clipped", dtype=limits.dtype.type, shape=value.shape)
    graph.nodes.append(gs.Node("Clip", name, inputs=[value, *bounds], outputs=[clipped]))
    return clipped
