"""Replace float weights by the integers of the recipe.

    conv      int8 [out, in, *k] -> DequantizeLinear(axis 0)
    Gemm      int8 [out, in]     -> DequantizeLinear(axis 0)         transB = 1
    MatMul    int8 [in, out]     -> DequantizeLinear(axis 1)

Where the target folds casts of constants, integers of 4 bits and fewer are stored packed, ``INT4 -> Cast(INT8) ->
DequantizeLinear``: ONNX Runtime does it when it loads the model, so the kernel is the 8-bit one and the file half
the size. Where the target has kernels for them, the Cast is left out. The learned integers are stored as they are,
never re-rounded from floats.

Power-of-two scaling (PTS) shifts the integers of input channel k by ``d_k - min d``, and the scale takes
``2^(min d)``. The shifts are in the stored int8 (fold), or the engine puts them there when it loads ``INT4 ->
Cast(INT32) -> Mul(2^(d_k - min d)) -> Cast(INT8)`` (shift): see ``pts_lowering``. Neither costs anything at run time.

A bias feeding an integer kernel is int32 on the accumulator's grid, ``input.scale * weight.scale``, where the target
wants integers; else it stays in floating point.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes, is_transposed
from tfmq_export.passes.graph import constant, int4_constant, variable
from tfmq_export.passes.qdq.integer_bias import accumulator_step, store_bias
from tfmq_export.passes.reading import float_values, release_values
from tfmq_export.passes.scaling.pts_lowering import PACKED_BITS, Form, choose_form
from tfmq_export.passes.scaling.rescale_inputs import scale_input_channels
from tfmq_export.recipe.names import weight_codes_name, weight_dequantizer_name
from tfmq_export.recipe.pairs import within_pairs
from tfmq_export.recipe.recipe import WEIGHT_REACH, LayerRecipe
from tfmq_export.target import PtsLowering, Target

Number = TypeVar("Number", bound=np.generic)
FARTHEST = WEIGHT_REACH + 1e-4
"""Steps between a weight and its code as float32 measures them, give or take the last bits of 127 steps."""


@dataclass(frozen=True)
class QuantizeWeights(RecipePass):
    """Give every layer of the recipe its integer weight and bias.

    Attributes:
        pts_lowering: The form of shifted weights.
    """

    target: Target
    pts_lowering: PtsLowering = "auto"
    semantics: ClassVar[Semantics] = Semantics.QUANTIZING

    def requires(self, graph: gs.Graph) -> None:
        for layer, node in bound_nodes(graph, self.recipe):
            weight = node.inputs[1]
            if not isinstance(weight, gs.Constant):
                raise PreconditionError(f"{layer.path}: its weight {weight.name} is not a constant")
            self._form(layer)
            _prove_binding(layer, _as_stored(float_values(weight), transposed=is_transposed(node)))
            release_values(weight)

    def apply(self, graph: gs.Graph) -> Changes:
        notes = []
        for layer, node in bound_nodes(graph, self.recipe):
            form = self._form(layer)
            if form is not None:
                notes.append((layer.path, f"power-of-two scaling: {form}"))
            node.inputs[1] = self._dequantized_weight(graph, layer, form, transposed=is_transposed(node))
            if len(node.inputs) > 2:
                node.inputs[2] = self._bias(graph, layer, node.inputs[2])
        return Changes(tuple(layer.path for layer in self.recipe.layers), notes=tuple(notes))

    def _form(self, layer: LayerRecipe) -> Form | None:
        return choose_form(layer, self.target, self.pts_lowering)

    def _dequantized_weight(
        self, graph: gs.Graph, layer: LayerRecipe, form: Form | None, *, transposed: bool
    ) -> gs.Variable:
        codes = _as_stored(layer.weight_codes, transposed=transposed)
        shift = _as_stored(layer.weight_shifts, transposed=transposed)
        if form == "fold":
            codes = (codes * shift).astype(np.int8)
        packed = self.target.packed_weights and layer.weight.spec.bits <= PACKED_BITS and form != "fold"
        scale = constant(f"{layer.name}.weight_scale", layer.weight_step)
        no_offset = np.zeros(len(layer.weight.scale), np.int8)
        if packed and self.target.int4_kernels:
            stored: gs.Tensor = int4_constant(weight_codes_name(layer.name), codes)
            zero_point = int4_constant(f"{layer.name}.weight_zero_point", no_offset)
        else:
            stored = _stored_codes(graph, layer.name, codes, shift if form == "shift" else None, packed=packed)
            zero_point = constant(f"{layer.name}.weight_zero_point", no_offset)
        real = variable(f"{layer.name}.weight_dequantized", dtype=np.float32, shape=codes.shape)
        name, inputs = weight_dequantizer_name(layer.name), [stored, scale, zero_point]
        graph.nodes.append(gs.Node("DequantizeLinear", name, {"axis": 1 if transposed else 0}, inputs, [real]))
        return real

    def _bias(self, graph: gs.Graph, layer: LayerRecipe, bias: gs.Tensor) -> gs.Tensor:
        if not isinstance(bias, gs.Constant):
            raise PreconditionError(f"{layer.path}: its bias {bias.name} is not a constant")
        return _dequantized_bias(graph, layer, bias) if self.target.integer_bias else bias


def _as_stored(values: NDArray[Number], *, transposed: bool) -> NDArray[Number]:
    """[out, in] as the graph reads it, and back."""
    return values.T if transposed else values


def _prove_binding(layer: LayerRecipe, weight: NDArray[np.floating]) -> None:
    """The recipe's integers must be this weight, held to its grid, to ``WEIGHT_REACH`` steps.

    Args:
        weight: ``tau 2^d W``, as ``RescaleInputs`` leaves it.
    Raises:
        PostconditionError: they are not.
    """
    codes = layer.weight_codes
    if layer.pts_exponent is not None and weight.shape == codes.shape:
        weight = scale_input_channels(weight, np.exp2(-layer.pts_exponent.astype(np.float32)), layer.groups)
    if weight.shape != codes.shape:
        raise PreconditionError(
            f"{layer.path}: the graph's weight is {weight.shape}, the recipe's {codes.shape}; made from another model?"
        )
    steps = weight / layer.weight.scale.reshape(-1, *[1] * (codes.ndim - 1))
    neighbours = layer.neighbours
    if neighbours is not None and layer.weight.spec.pair_sum is not None:
        steps = within_pairs(steps.reshape(len(steps), -1), neighbours).reshape(codes.shape)
    held = steps.clip(layer.weight.spec.qmin, layer.weight.spec.qmax)
    if (np.abs(held - codes) > FARTHEST).any():
        raise PostconditionError(
            f"{layer.path}: the recipe's integers are not a rounding of this weight; made from another model?"
        )


def _stored_codes(
    graph: gs.Graph, layer: str, codes: NDArray[np.int8], shift: NDArray[np.int32] | None, *, packed: bool
) -> gs.Tensor:
    """The integers as int8: packed where they are narrow, shifted where PTS says so."""
    name = weight_codes_name(layer)
    stored: gs.Tensor = int4_constant(name, codes) if packed else constant(name, codes)
    if shift is not None:
        wide = _cast(graph, stored, f"{layer}.weight_int32", TensorProto.INT32, codes.shape)
        stored = variable(f"{layer}.weight_shifted", dtype=np.int32, shape=codes.shape)
        factors = constant(f"{layer}.weight_shift", shift)
        graph.nodes.append(gs.Node("Mul", f"{layer}.weight_shift_by", inputs=[wide, factors], outputs=[stored]))
    if packed or shift is not None:
        return _cast(graph, stored, f"{layer}.weight_int8", TensorProto.INT8, codes.shape)
    return stored


def _cast(graph: gs.Graph, value: gs.Tensor, name: str, to: int, shape: tuple[int, ...]) -> gs.Variable:
    result = variable(name, dtype=helper.tensor_dtype_to_np_dtype(to), shape=shape)
    graph.nodes.append(gs.Node("Cast", f"{name}.cast", {"to": to}, inputs=[value], outputs=[result]))
    return result


def _dequantized_bias(graph: gs.Graph, layer: LayerRecipe, bias: gs.Constant) -> gs.Variable:
    codes = np.round(bias.values.astype(np.float64) / accumulator_step(layer))
    return store_bias(graph, layer, codes, f"{layer.name}.bias")
