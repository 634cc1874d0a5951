"""From a calibrated program to a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass

from tfmq_export.analysis import SAMPLE, Operation
from tfmq_export.program import DiffusionProgram
from tfmq_export.progress import Step
from tfmq_export.ptq.calibration import CalibrationSet
from tfmq_export.ptq.observers import Estimator, activation_grid
from tfmq_export.ptq.weights import quantize_weight
from tfmq_export.recipe import FloatLayer, LayerRecipe, QuantRecipe, TibRecipe

BOUNDARY_BITS = 8
OUTPUT_BITS = 8


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """What to quantize, and how.

    Attributes:
        preset: Its name.
        weight_bits: 0 leaves every layer in floating point.
        activation_bits: Of layer inputs. First and last layer always take 8.
        estimator: How activation ranges become scales.
        quantized_outputs: Kinds of layer whose output the target wants on a grid.
    """

    preset: str
    weight_bits: int
    activation_bits: int
    estimator: Estimator = Estimator.MSE
    quantized_outputs: frozenset[str] = frozenset()


def float_layers(program: DiffusionProgram) -> tuple[FloatLayer, ...]:
    """The layers no preset quantizes, with the reasons."""
    return tuple(FloatLayer(op.name, op.path, op.macs, reason) for op, reason in program.left_float)


def quantize(
    program: DiffusionProgram,
    calibration: CalibrationSet | None,
    tib: TibRecipe,
    plan: QuantPlan,
    provenance: Mapping[str, str],
    progress: Step,
) -> QuantRecipe:
    """Choose grids and round every weight.

    Args:
        calibration: None only when the plan quantizes nothing.
    """
    left = float_layers(program)
    if calibration is None:
        left += tuple(
            FloatLayer(op.name, op.path, op.macs, f"preset {plan.preset} keeps it") for op in program.operations
        )
        return QuantRecipe(program.fingerprint, plan.preset, (), left, tib, program.macs, dict(provenance))
    layers = []
    on_sample = [op.name for op in program.operations if SAMPLE in op.roles]
    boundary = {on_sample[0], on_sample[-1]} if on_sample else set()
    for done, op in enumerate(program.operations, start=1):
        layers.append(_quantize_layer(program, op, calibration, plan, op.name in boundary))
        progress(done, len(program.operations))
    return QuantRecipe(program.fingerprint, plan.preset, tuple(layers), left, tib, program.macs, dict(provenance))


def _quantize_layer(
    program: DiffusionProgram, op: Operation, calibration: CalibrationSet, plan: QuantPlan, is_boundary: bool
) -> LayerRecipe:
    weight_bits = BOUNDARY_BITS if is_boundary else plan.weight_bits
    activation_bits = BOUNDARY_BITS if is_boundary else plan.activation_bits
    weight, codes = quantize_weight(program.value(op.weight), weight_bits)
    output = None
    if op.kind in plan.quantized_outputs:
        # The engine's container, not the preset's choice: always 8 bits.
        output = activation_grid(calibration.observations[op.name], OUTPUT_BITS, plan.estimator)
    return LayerRecipe(
        name=op.name,
        path=op.path,
        kind=op.kind,
        macs=op.macs,
        weight=weight,
        weight_codes=codes,
        input=activation_grid(calibration.observations[op.input], activation_bits, plan.estimator),
        output=output,
    )
