"""Lower activation grids that no single code of the target holds.

    x^  ==  s (q - z)  ==  s sum_k q_k - s (K m + z)        q_k = clip(round((x + c_k) / s), m, m + 255)
    conv(x^, W) + b  ==  conv([s q_0 | s q_1 | ...], [W | W | ...]) + (b - s (K m + z) sum W)

with ``c_k = s (z + m - 255 k)`` and m the lowest code (0 or -128). One code (K = 1) carries an 8-bit grid with a
zero point on an engine that has none; several, each taking over where the one before saturates, resolve the sample
finer than 8 bits. The constant part of ``x^`` meets every tap of the kernel, so padding is done in front of the
quantizer, on real numbers; with the convolution's own zero padding the border would be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.qdq.activation_codes import CODE_LEVELS, code_type, fits, grid_constants, reads_dequantized
from tfmq_export.passes.qdq.offset_bias import take_off_bias
from tfmq_export.passes.reading import constant_values, int_attribute, ints_attribute, produced_by
from tfmq_export.recipe.grid import QParams
from tfmq_export.recipe.names import INPUT_COPY, INPUT_OFFSET, INPUT_PAD, REPEATED
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import Target

Pads = tuple[int, ...]


@dataclass(frozen=True)
class OffsetInputs(RecipePass):
    """Quantize the inputs that ``InsertQdq`` left; runs behind ``QuantizeWeights``."""

    target: Target
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in self._mine(graph):
            if layer.input.spec.bits != 8:
                raise PreconditionError(f"{layer.path}: only 8-bit codes can be offset, not {layer.input.spec.bits}")
            check_pads(layer, node)
            if reads_dequantized(node):
                raise PreconditionError(f"{layer.path}: its input is quantized already")
            stored = node.inputs[1].inputs
            if not stored or stored[0].op != "DequantizeLinear":
                raise PreconditionError(f"{layer.path}: run QuantizeWeights first")
            if layer.input.spec.codes > 1:
                _check_stackable(layer, node)

    def apply(self, graph: gs.Graph) -> Changes:
        ready: dict[tuple[str, Pads], list[tuple[QParams, gs.Variable]]] = {}
        layers = self._mine(graph)
        for layer, node in layers:
            source, pads = node.inputs[0], take_pads(node)
            known = ready.setdefault((source.name, pads), [])
            shared = next((value for grid, value in known if grid.same_as(layer.input)), None)
            if shared is None:
                shared = _quantize(graph, source, pads, layer, self.target)
                known.append((layer.input, shared))
            node.inputs[0] = shared
            _tile_weight(node, layer.input.spec.codes)
            take_off_bias(graph, node, layer, surplus(layer.input, self.target), self.target)
        return Changes(tuple(layer.path for layer, _ in layers))

    def ensures(self, graph: gs.Graph) -> None:
        for layer, node in self._mine(graph):
            if not reads_dequantized(node):
                raise PostconditionError(f"{layer.path}: its input is not quantized")

    def _mine(self, graph: gs.Graph) -> list[tuple[LayerRecipe, gs.Node]]:
        return [
            (layer, node)
            for layer, node in bound_nodes(graph, self.recipe)
            if layer.input_by_timestep is None and not fits(layer, self.target)
        ]


def offsets(grid: QParams, target: Target) -> NDArray[np.float32]:
    """What each code's quantizer adds, ``c_k``, [codes]."""
    starts = np.int64(grid.zero_point) + np.iinfo(code_type(target)).min - CODE_LEVELS * np.arange(grid.spec.codes)
    return (np.float64(grid.scale) * starts).astype(np.float32)


def surplus(grid: QParams, target: Target) -> int:
    """What the codes of a value add up to too much, ``K m + z``, in steps."""
    return grid.spec.codes * int(np.iinfo(code_type(target)).min) + int(grid.zero_point)


def _check_stackable(layer: LayerRecipe, node: gs.Node) -> None:
    if node.op != "Conv" or int_attribute(node, "group", 1) != 1:
        raise PreconditionError(f"{layer.path}: only a plain convolution can take several input codes")
    if not isinstance(node.inputs[1].inputs[0].inputs[0], gs.Constant):
        raise PreconditionError(f"{layer.path}: a packed or shifted weight cannot be repeated")


def check_pads(layer: LayerRecipe, node: gs.Node) -> None:
    """Refuse padding that is not given in numbers.

    Raises:
        PreconditionError: it is automatic.
    """
    if node.op == "Conv" and node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        raise PreconditionError(f"{layer.path}: its padding is {node.attrs['auto_pad']}; give it in numbers")


def take_pads(node: gs.Node) -> Pads:
    """The padding of a convolution, which loses it."""
    pads = tuple(ints_attribute(node, "pads") or ())
    if any(pads):
        node.attrs["pads"] = [0] * len(pads)
        return pads
    return ()


def _quantize(graph: gs.Graph, source: gs.Tensor, pads: Pads, layer: LayerRecipe, target: Target) -> gs.Variable:
    grid, prefix = layer.input, f"{layer.name}.input"
    codes = grid.spec.codes
    value = pad(graph, source, pads, layer.name) if pads else source
    added = offsets(grid, target)
    if codes > 1:
        copies = variable(f"{prefix}.copies", np.float32)
        graph.nodes.append(gs.Node("Concat", f"{layer.name}{INPUT_COPY}", {"axis": 1}, [value] * codes, [copies]))
        value = copies
        channels = layer.weight_codes.shape[1]
        added = np.repeat(added, channels).reshape(-1, *[1] * (layer.weight_codes.ndim - 2))
    else:
        added = added.reshape(())
    moved = variable(f"{prefix}.moved", np.float32)
    stored = variable(f"{prefix}.codes", code_type(target))
    real = variable(f"{prefix}.dequantized", np.float32)
    starts = constant(f"{prefix}.offsets", added)
    constants = grid_constants(grid.scale, 0, code_type(target), prefix)
    graph.nodes += [
        gs.Node("Add", f"{layer.name}{INPUT_OFFSET}", inputs=[value, starts], outputs=[moved]),
        gs.Node("QuantizeLinear", f"{prefix}.quantize", inputs=[moved, *constants], outputs=[stored]),
        gs.Node("DequantizeLinear", f"{prefix}.dequantize", inputs=[stored, *constants], outputs=[real]),
    ]
    return real


def pad(graph: gs.Graph, source: gs.Tensor, pads: Sequence[int], layer: str) -> gs.Variable:
    """Zeros around the spatial axes; ``pads`` are [begin, ..., end, ...] as Conv has them."""
    half = len(pads) // 2
    full = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    padded = variable(f"{layer}.input.padded", np.float32)
    inputs = [source, constant(f"{layer}.input.pads", full)]
    graph.nodes.append(gs.Node("Pad", f"{layer}{INPUT_PAD}", {"mode": "constant"}, inputs, [padded]))
    return padded


def _tile_weight(node: gs.Node, codes: int) -> None:
    """Repeat a stored weight along its input channels, once per code."""
    if codes == 1:
        return
    dequantize = produced_by(node.inputs[1], "DequantizeLinear")
    stored = constant_values(dequantize.inputs[0])
    times = (1, codes, *[1] * (stored.ndim - 2))
    dequantize.inputs[0] = constant(f"{dequantize.inputs[0].name}{REPEATED}", np.tile(stored, times))
    dequantize.outputs[0].shape = None
