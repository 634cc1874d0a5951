"""A model captured once, quantized once per preset, and carried to every target from there.

What ``compile_model`` does for one bundle, taken apart for those who want many: capturing is two thirds of the time
that a small model takes.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram, capture, export_onnx
from tfmq_export.compiler.emit import Graphs, emit
from tfmq_export.config import CompileConfig, find_preset
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model, import_graph
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.scaling.split_results import results_to_split
from tfmq_export.proof.validate import Subject
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import QuantRecipe, TableType
from tfmq_export.target import Target, find_target


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A model, its graph, and the trajectory it is calibrated on."""

    denoiser: Denoiser
    program: DiffusionProgram
    recorded: tuple[CalibrationStep, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A recipe, and the graph it is for: with its skip concatenations split."""

    denoiser: Denoiser
    program: DiffusionProgram
    recipe: QuantRecipe


def capture_once(denoiser: Denoiser, *, images: int, seed: int = 0) -> Captured:
    """Capture a model and record its own trajectory."""
    return Captured(denoiser, capture(denoiser), calibrate(denoiser, images=images, seed=seed, progress=_silent))


def quantize_once(model: Captured, config: CompileConfig) -> Quantized:
    """Make a recipe that every target can take: with grids on the outputs of convolutions, as ort-cpu wants them."""
    preset, outputs = find_preset(config.preset), find_target("ort-cpu").quantized_outputs
    widths = preset.weight_bits, preset.activation_bits
    plan = QuantPlan(
        config.preset, *widths, config.method, find_effort(config.effort, preset.weight_bits), outputs, config.seed
    )
    # Splitting skip concatenations changes a program in place.
    own = replace(model.program, module=copy.deepcopy(model.program.module))
    subject = prepare(own, model.denoiser, model.recorded, plan, {"effort": config.effort})
    return Quantized(model.denoiser, subject.program, quantize(subject, plan, _silent))


def carry(made: Quantized, target: Target, root: Path, tables: TableType = "fp32") -> Subject:
    """Write the bundle of one target into a new folder.

    Args:
        tables: What rows of temporal tables are stored in.
    """
    denoiser = made.denoiser
    graph = import_graph(export_onnx(made.program))
    inputs = {"sample": denoiser.sample, "timestep": denoiser.timestep}
    adapted = adapt(made.recipe, target, tables)
    parts = results_to_split(graph, adapted, target)
    reports = run_passes(graph, passes_for(adapted, target, **inputs, split_results=parts))
    root.mkdir(parents=True)
    bundle = emit(root, denoiser, made.recipe, target, Graphs(export_model(graph), reports, tables=tables))
    return Subject(denoiser, made.program, made.recipe, bundle)


def _silent(done: int, total: int) -> None:
    """No progress."""
