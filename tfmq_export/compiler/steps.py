"""The steps of the compiler: capture, then ``quantize``, ``lower``, ``write`` and ``prove``.

Each takes plain data and gives plain data. ``chain.compile_model`` is all of them in a row; whoever wants many bundles
of one model calls them:

    made = quantize("model.pt", CompileConfig(preset="w4a8"))
    for target in ("ort-cpu", "openvino"):
        config = CompileConfig(preset="w4a8", target=target)
        bundle = write(lower(made, config), Path("out") / target)
        prove(made, bundle, config)
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tfmq_export.bundle.call import fingerprint_of
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture import program as capturing
from tfmq_export.capture.denoiser import Denoiser, Description
from tfmq_export.capture.device import find_device, module_on, repeatable
from tfmq_export.capture.eager import require_running
from tfmq_export.capture.float_graph import float_graph
from tfmq_export.capture.pages import release_pages
from tfmq_export.capture.program import program_on
from tfmq_export.capture.rewrites.program_for import program_for
from tfmq_export.compiler.correct import correct
from tfmq_export.compiler.decoder import find_decoder
from tfmq_export.compiler.forms import Captured, Lowered, Observed, Quantized
from tfmq_export.compiler.intervals import measure_intervals
from tfmq_export.compiler.making import QUANTIZING, RECORDING, REWRITING, WEIGHING, Making
from tfmq_export.compiler.onnx_components import check_components
from tfmq_export.compiler.plan import calibration_images, plan_for
from tfmq_export.compiler.prologue import cut_prologue
from tfmq_export.compiler.settings import check_pairs
from tfmq_export.compiler.write import write
from tfmq_export.config import CompileConfig, Components
from tfmq_export.errors import RecipeError, TfmqError
from tfmq_export.models.factory import denoiser_from_code
from tfmq_export.models.load import Source, load
from tfmq_export.models.recorded.load import Draw
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import import_graph
from tfmq_export.passes.graph_file import dump_to, skeleton
from tfmq_export.passes.pipeline import gridding_passes, passes_for
from tfmq_export.progress import Progress, Silent
from tfmq_export.proof.pictures import TemporalRow, pictures_of, save_comparison, save_temporal
from tfmq_export.proof.plan import ProofPlan
from tfmq_export.proof.validate import Subject, Validation, validate
from tfmq_export.ptq import image_gain as weighing
from tfmq_export.ptq.tib import tabulate
from tfmq_export.ptq.walk import quantize as walking
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.checkpoint import Checkpoint
from tfmq_export.ptq.walk.widths import Widths
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.report.bundle_page import write_page
from tfmq_export.report.card import write_card
from tfmq_export.report.facts import Facts
from tfmq_export.runtime.decode import decodes, looked_at
from tfmq_export.runtime.engines.tensorrt.building.files import add_engines_in_place
from tfmq_export.runtime.engines.tensorrt.building.lint import lint_model, raise_if_any
from tfmq_export.runtime.picture import PER_ROW
from tfmq_export.target import find_target

__all__ = ["capture", "load_model", "lower", "observe", "prove", "quantize", "reuse", "write"]

Model = str | Path | Source | tuple[nn.Module, Description | Draw]
"""A folder or file, a ``Source`` with more options, or any module with ``draw(seed)`` or its ``Description``."""

PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-graphsurgeon", "numpy")
SILENT = Silent()


def load_model(
    model: Model, components: Components = "none", progress: Progress = SILENT, *, decoder: bool = False
) -> Denoiser:
    """Load a model of any form.

    Args:
        components: What a pipeline's other components will have to become: refused now where they cannot.
        decoder: Whether its VAE's decoder will be written as ONNX, likewise.
    Raises:
        LoadError, ConfigError: the model or a component cannot be used.
    """
    with progress.stage("Loading"):
        if isinstance(model, tuple):
            denoiser = denoiser_from_code(model, None, where=type(model[0]).__name__)
        else:
            denoiser = load(model if isinstance(model, Source) else Source(Path(model)))
        check_components(denoiser.pipeline, components)
        if decoder and components != "none":
            find_decoder(denoiser)
        return denoiser


def capture(model: Model | Denoiser, progress: Progress = SILENT) -> Captured:
    """Capture a model's graph; loads it first where that is still to do.

    Raises:
        LoadError, ConfigError: the model cannot be used.
        ExportError: torch.export cannot trace the module, or its batch axis is fixed.
    """
    denoiser = model if isinstance(model, Denoiser) else load_model(model, progress=progress)
    with progress.stage("Running the model once"):
        require_running(denoiser)
    with progress.stage("Capturing the graph"):
        return Captured(denoiser, capturing.capture(denoiser))


def observe(denoiser: Denoiser, config: CompileConfig, progress: Progress = SILENT) -> Observed:
    """Draw images in full precision, record every call, and weigh the timesteps where the method asks for it.

    Raises:
        CalibrationError: the model predicts NaN or infinity.
    """
    device = find_device(config.device)
    with repeatable(device):
        there = replace(denoiser, module=module_on(denoiser.module, device))
        images = calibration_images(config)
        with progress.stage(RECORDING) as step:
            calls = calibrate(there, images=images, seed=config.seed, progress=step)
        if config.method.timestep_weights != "image":
            return Observed(calls)
        with progress.stage(WEIGHING) as step:
            gain = weighing.image_gain(there, calls, images=images, seed=config.seed, progress=step)
            return Observed(calls, gain)


def quantize(  # noqa: PLR0913  # options by keyword
    model: Captured | Denoiser | Model,
    config: CompileConfig | None = None,
    *,
    observed: Observed | None = None,
    widths: Mapping[str, Widths] | None = None,
    notes: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Quantized:
    """Calibrate on the model's own trajectory, choose grids, round every weight.

    Args:
        model: As ``capture`` gives it; any other form is captured first.
        observed: The trajectory, where ``observe`` recorded it before.
        widths: Of layers, by the value they compute, in place of those that ``config`` pins.
        notes: What the recipe says of its making beside the settings.
        checkpoint: Folder where finished blocks are kept until the run is done.
        resume: Go on from that folder, where it was left by a run with these settings.
    Raises:
        ConfigError: the settings do not fit each other.
        CalibrationError: the model predicts NaN or infinity.
    """
    config = config or CompileConfig()
    captured = model if isinstance(model, Captured) else capture(model, progress)
    denoiser, program, device = captured.denoiser, captured.program, find_device(config.device)
    plan = plan_for(config, program, widths)
    made_with = _provenance(denoiser, config, plan)
    provenance = made_with | dict(notes or {})
    if not plan.weight_bits:
        recipe = walking.unquantized(program, config.preset, tabulate(program, denoiser), provenance)
        return Quantized(denoiser, program, recipe)
    settings = {"fingerprint": program.fingerprint, "preset": plan.preset, **made_with, **_drawing(denoiser)}
    settings |= {"timesteps": f"{len(denoiser.timesteps)}: {denoiser.timesteps.describe()}"}
    settings |= {"quantized outputs": ", ".join(sorted(plan.quantized_outputs)) or "none"}
    settings |= {"layers": ", ".join(f"{name} W{x.weights}A{x.inputs}" for name, x in sorted(plan.widths.items()))}
    keeper = nullcontext() if checkpoint is None else Checkpoint(checkpoint, settings, resume=resume)
    with keeper as kept, repeatable(device):
        seen = observed or observe(denoiser, config, progress)
        weights = None
        if plan.method.timestep_weights == "image" and seen.gain is not None:
            provenance["image_gain"] = " ".join(f"{value:.3g}" for value in seen.gain.tolist())
            weights = weighing.weights_from(seen.gain)
        with progress.stage("Tabulating the timesteps"):
            subject = prepare(program, denoiser, seen.calls, plan, provenance, weights)
            release_pages(denoiser.module.parameters())  # blocks read theirs one by one
        with progress.stage(QUANTIZING) as step:
            moved = replace(subject, program=program_on(subject.program, device))
            recipe = walking.quantize(moved, plan, step, kept)
        there = replace(denoiser, module=module_on(denoiser.module, device))
        return Quantized(denoiser, subject.program, correct(there, moved.program, recipe, config, progress))


def reuse(model: Captured, recipe: QuantRecipe, config: CompileConfig | None = None) -> Quantized:
    """Take a recipe that was made before, in place of ``quantize``.

    Raises:
        RecipeError: it was made from another model or for another schedule.
        TargetError: its weights would saturate on some of the target's hosts.
    """
    config, denoiser = config or CompileConfig(), model.denoiser
    if recipe.fingerprint != model.program.fingerprint:
        raise RecipeError(
            f"the recipe was made from another model than {denoiser.source}; quantize again without --recipe"
        )
    if recipe.tib.timesteps != denoiser.timesteps:
        raise RecipeError(
            f"the recipe is for {len(recipe.tib.timesteps)} steps ({recipe.tib.timesteps.describe()}), "
            f"--steps asks for {len(denoiser.timesteps)} ({denoiser.timesteps.describe()})"
        )
    check_pairs(recipe, find_target(config.target), config.method)
    return Quantized(denoiser, program_for(model.program, recipe), recipe)


def lower(
    made: Quantized, config: CompileConfig | None = None, *, dump_dir: Path | None = None, progress: Progress = SILENT
) -> Lowered:
    """Rewrite the graph for ``config.target``.

    Args:
        dump_dir: Save the graph after each pass here.
    Raises:
        TargetError: the target has no lowering for something in the recipe.
        PreconditionError, PostconditionError: a pass cannot keep its law on this graph.
    """
    config, denoiser = config or CompileConfig(), made.denoiser
    target = find_target(config.target)
    with progress.stage(REWRITING):
        exported = float_graph(made.program)
        graph = import_graph(exported.proto, exported.weights)
        passes = passes_for(
            adapt(made.recipe, target, config.tables),
            target,
            sample=denoiser.sample,
            timestep=denoiser.timestep,
            labels=tuple(denoiser.conditioning) if config.class_tables else (),
            pts_lowering=config.pts_lowering,
        )
        reports = run_passes(graph, passes, None if dump_dir is None else dump_to(dump_dir))
        lowered = Lowered(made, target, graph, reports, tables=config.tables)
        release_pages(denoiser.module.parameters())  # read to prove the binding
    if target.integers_only:
        with progress.stage("Measuring what lies between layers") as step:
            intervals = measure_intervals(graph, denoiser, seed=config.seed, progress=step)
        last = gridding_passes(adapt(made.recipe, target), target, intervals, denoiser.timestep)
        dump = None if dump_dir is None else dump_to(dump_dir, behind=len(reports))
        lowered = replace(lowered, reports=reports + run_passes(graph, last, dump))
    if config.prologue:
        with progress.stage("Cutting the prologue off"):
            main, prologue = cut_prologue(graph, denoiser, made.recipe)
            lowered = replace(lowered, graph=main, prologue=prologue)
    if target.engine == "tensorrt":
        _lint(lowered)
    return lowered


def prove(
    made: Quantized,
    bundle: Bundle,
    config: CompileConfig | None = None,
    *,
    plan: ProofPlan | None = None,
    making: Making | None = None,
    progress: Progress = SILENT,
) -> Validation:
    """Measure a bundle against the model it came from, and finish it: report, pictures, self-test.

    Where a bound is missed, report and pictures are written all the same.

    Args:
        plan: How much is compared, where a forecast has timed the model; as ``config`` allows if None.
        making: What the report says of how the bundle was made; read at the end.
    Raises:
        PrecisionError: a layer would not run in the integers asked for.
        AccuracyError: a threshold was missed.
    """
    config, making = config or CompileConfig(), making or Making()
    subject = Subject(made.denoiser, made.program, made.recipe, bundle)
    validation = validate(
        subject,
        config.thresholds,
        plan=plan,
        images=config.validation_images,
        budget=config.budget.total_seconds(),
        seed=config.seed + 1,
        progress=progress,
    )
    try:
        if not config.allow_precision_loss:
            validation.receipt.raise_if_lost()
        validation.report.raise_if_failed()
    except TfmqError as error:
        _write_proof(made, bundle, validation, making)
        if validation.notes:  # what looks wrong about the float model may be why
            raise type(error)("; ".join([str(error), *validation.notes])) from error
        raise
    if find_target(bundle.manifest.target).built_in_place:
        with progress.stage("Building the engine"):
            bundle = add_engines_in_place(bundle, allow_precision_loss=config.allow_precision_loss)
    bundle = validation.self_test.save(bundle)
    _write_proof(made, bundle, validation, making)
    return validation


def _write_proof(made: Quantized, bundle: Bundle, validation: Validation, making: Making) -> None:
    """The report, and pictures of it."""
    extra = making.to_json()
    if bundle.manifest.correction is not None:
        extra["correction"] = bundle.manifest.correction
    if bundle.manifest.prologue is not None:
        extra["prologue"] = asdict(bundle.manifest.prologue)
    validation.write(bundle.report, extra)
    if made.recipe.tib.source != "table":
        errors = validation.temporal
        row = TemporalRow(made.recipe.tib.source, errors.cosine, errors.mismatch)
        save_temporal(bundle.root / "tfmq" / "temporal.png", made.denoiser.timesteps.values, [row])
    reference, compiled = _as_pictures(bundle, validation)
    save_comparison(bundle.root / "tfmq" / "samples.png", reference, compiled)
    pictures = pictures_of(reference, compiled, validation.states)
    if pictures is not None:
        pictures.save(bundle.root)
    facts = Facts.read(bundle.root)
    write_page(facts)
    write_card(facts)


def _as_pictures(bundle: Bundle, validation: Validation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What both models drew, to be looked at: latents are decoded where the bundle brings a decoder."""
    both = validation.reference_images, validation.images
    if not decodes(bundle, both[0].shape[1:]):
        return both
    first, second = (looked_at(bundle, batch[:PER_ROW]) for batch in both)
    return first, second


def _provenance(denoiser: Denoiser, config: CompileConfig, plan: QuantPlan) -> dict[str, str]:
    """What the recipe says of its making."""
    return {
        "model": denoiser.source,
        "seed": str(config.seed),
        "effort": config.effort,
        "device": find_device(config.device).type,
        "calibration_images": str(calibration_images(config)),
        **{name: str(value) for name, value in plan.method.model_dump().items()},
        "cpus": config.method.cpus,  # as asked: where nothing saturates, others' hosts were not thought of
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _drawing(denoiser: Denoiser) -> dict[str, str]:
    """What the trajectory follows from beside the model, in short."""
    given = denoiser.conditioning, denoiser.unconditional
    prompts = [{name: _fingerprint(value) for name, value in each.items()} for each in given]
    return {
        "scheduler": f"{denoiser.sampler_info.kind} {_digest(denoiser.scheduler_config)}",
        "guidance": f"{denoiser.sampler_info.guidance_scale:g}",
        "prompts": _digest([denoiser.requests, *prompts]),
    }


def _fingerprint(value: Tensor) -> str:
    plain = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return fingerprint_of(plain.numpy(force=True))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _lint(lowered: Lowered) -> None:
    prologue = lowered.prologue
    prompts = list(lowered.made.denoiser.ragged)
    profiled = prompts if prologue is None else [*prompts, *prologue.tables]
    raise_if_any(lint_model(skeleton(lowered.graph), profiled=profiled), lowered.target.name)
    if prologue is not None:
        raise_if_any(lint_model(skeleton(prologue.graph)), lowered.target.name)
