"""The chain, on one screen: load, capture, calibrate, quantize, rewrite, write, prove."""

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.write import replaced_folder
from tfmq_export.capture.denoiser import Denoiser, Description
from tfmq_export.capture.device import find_device, module_on, repeatable
from tfmq_export.capture.program import DiffusionProgram, capture, export_onnx, program_on
from tfmq_export.capture.rewrites.program_for import program_for
from tfmq_export.compiler.emit import Graphs, emit
from tfmq_export.compiler.onnx_components import check_components
from tfmq_export.compiler.prologue import cut_prologue
from tfmq_export.compiler.settings import check_pairs, check_settings, settle
from tfmq_export.config import CompileConfig, find_preset
from tfmq_export.errors import ConfigError, RecipeError
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import dump_to, export_model, import_graph
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.scaling.split_results import results_to_split
from tfmq_export.progress import Progress, Silent, Step
from tfmq_export.proof.pictures import TemporalRow, save_comparison, save_temporal
from tfmq_export.proof.validate import Subject, Validation, validate
from tfmq_export.ptq.image_gain import image_gain, weights_from
from tfmq_export.ptq.tib import tabulate
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.checkpoint import Checkpoint
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.quantize import quantize, unquantized
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.io import load_recipe
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.open import require_engine
from tfmq_export.runtime.engines.tensorrt.building.files import add_engines_in_place
from tfmq_export.runtime.engines.tensorrt.building.lint import lint_model, raise_if_any
from tfmq_export.runtime.measure.benchmark import peak_rss_bytes
from tfmq_export.target import find_target

PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-graphsurgeon", "numpy")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ``tfmq_export.compile`` made.

    Attributes:
        bundle: The output folder.
        validation: The proof that went into its report.
        seconds: Time of each stage.
    """

    bundle: Bundle
    validation: Validation
    seconds: dict[str, float]


def compile_model(  # noqa: PLR0913  # options of the one public entry, by keyword
    model: str | Path | Source | tuple[nn.Module, Description],
    output: str | Path,
    config: CompileConfig | None = None,
    *,
    recipe: Path | None = None,
    resume: bool = False,
    dump_dir: Path | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a diffusion model into a bundle, and prove it.

    Args:
        model: A path (diffusers folder, pipeline folder or ``model.pt``), a ``Source`` with more options, or any
            module with its ``Description``.
        output: The bundle's folder; an older bundle there is replaced at the very end.
        config: Preset, target, effort and all else that the command line knows; w8a8 for ``ort-cpu`` if None.
        recipe: Take the recipe of this bundle or file instead of quantizing again.
        resume: Go on where an interrupted run with this output and these settings stopped.
        dump_dir: Save the graph after each pass here.
        progress: Told of each stage and how far it is; silent if None.
    Returns:
        The bundle, the proof that went into its report, and the seconds of each stage.
    Raises:
        LoadError: the model cannot be read.
        ConfigError: options that do not fit together, or a schedule that cannot be walked.
        DependencyError: the target's engine is not installed.
        TargetError: the target cannot run what is asked for; known before any long work.
        ExportError: the model cannot be captured.
        RecipeError: the recipe was made from another model or schedule.
        BuildError: the engine refused the graph.
        PrecisionError: a layer would not run in the integers asked for.
        AccuracyError: a threshold was missed. Nothing half-written is left behind; finished blocks stay in
            ``.NAME.checkpoint`` beside the output, for ``resume``.
    """
    config = config or CompileConfig()
    stages = _Timed(progress or Silent())
    root = Path(output)
    target = find_target(config.target)
    require_engine(target)
    check_settings(config, target)
    find_device(config.device)
    given = None if recipe is None else _load_recipe(recipe, config)
    with stages.stage("Loading"):
        denoiser = _load(model)
        check_components(denoiser.pipeline, config.components)
    with replaced_folder(root) as partial:
        with stages.stage("Capturing the graph"):
            program = capture(denoiser)
        if given is not None:
            made = given
            _check_recipe(made, program, denoiser)
            check_pairs(made, target, config.method)
            program = program_for(program, made)
        else:
            program, made = _quantize(denoiser, program, config, stages, (checkpoint_of(root), resume))
        with stages.stage("Rewriting the graph"):
            graph = import_graph(export_onnx(program))
            after = dump_to(dump_dir) if dump_dir is not None else None
            inputs = {"sample": denoiser.sample, "timestep": denoiser.timestep}
            labels = tuple(denoiser.conditioning) if config.class_tables else ()
            adapted = adapt(made, target, config.tables)
            passes = passes_for(
                adapted,
                target,
                **inputs,
                labels=labels,
                pts_lowering=config.pts_lowering,
                split_results=results_to_split(graph, adapted, target),
            )
            reports = run_passes(graph, passes, after)
            graphs = Graphs(export_model(graph), reports, tables=config.tables)
        if config.prologue:
            with stages.stage("Cutting the prologue off"):
                main, prologue = cut_prologue(graph, denoiser, made)
                graphs = replace(graphs, model=main, prologue=prologue)
        if target.engine == "tensorrt":
            _lint(graphs, target.name)
        with stages.stage("Writing"):
            bundle = emit(partial, denoiser, made, target, graphs, config.components)
        subject = Subject(denoiser, program, made, bundle)
        validation = validate(
            subject, config.thresholds, images=config.validation_images, seed=config.seed + 1, progress=stages
        )
        if not config.allow_precision_loss:
            validation.receipt.raise_if_lost()
        validation.report.raise_if_failed()
        if target.built_in_place:
            with stages.stage("Building the engine"):
                bundle = add_engines_in_place(bundle, allow_precision_loss=config.allow_precision_loss)
        extra: dict[str, object] = {"seconds": stages.seconds, "peak_memory_bytes": peak_rss_bytes()}
        if bundle.manifest.prologue is not None:
            extra["prologue"] = asdict(bundle.manifest.prologue)
        bundle = validation.self_test.save(bundle)
        validation.write(bundle.report, extra)
        if made.tib.source != "table":
            errors = validation.temporal
            row = TemporalRow(made.tib.source, errors.cosine, errors.mismatch)
            save_temporal(bundle.root / "tfmq" / "temporal.png", denoiser.timesteps.values, [row])
        save_comparison(bundle.root / "tfmq" / "samples.png", validation.reference_images, validation.images)
    shutil.rmtree(checkpoint_of(root), ignore_errors=True)  # only now is its work safe
    return Compiled(Bundle(root, bundle.manifest), validation, stages.seconds)


def _lint(graphs: Graphs, target: str) -> None:
    raise_if_any(lint_model(graphs.model, profiled=[] if graphs.prologue is None else graphs.prologue.tables), target)
    if graphs.prologue is not None:
        raise_if_any(lint_model(graphs.prologue.model), target)


def checkpoint_of(root: Path) -> Path:
    """Where the finished blocks of an interrupted run wait."""
    return root.absolute().with_name(f".{root.absolute().name}.checkpoint")


def _load(model: str | Path | Source | tuple[nn.Module, Description]) -> Denoiser:
    if isinstance(model, tuple):
        if len(model) != 2:
            raise ConfigError("expected (module, tfmq_export.Description)")
        return describe(*model, steps=None, source=type(model[0]).__name__)
    return load(model if isinstance(model, Source) else Source(Path(model)))


def _quantize(
    denoiser: Denoiser, program: DiffusionProgram, config: CompileConfig, stages: "_Timed", keep: tuple[Path, bool]
) -> tuple[DiffusionProgram, QuantRecipe]:
    """The recipe, and the program it is for: with its skip concatenations split.

    Args:
        keep: Folder of the checkpoint, and whether to go on from it.
    """
    preset = find_preset(config.preset)
    effort = find_effort(config.effort, preset.weight_bits)
    method = settle(config.method, find_target(config.target))
    images, device = config.calibration_images or effort.images, find_device(config.device)
    provenance = {
        "model": denoiser.source,
        "seed": str(config.seed),
        "effort": config.effort,
        "device": device.type,
        "calibration_images": str(images),
        **{name: str(value) for name, value in method.model_dump().items()},
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if not preset.weight_bits:
        return program, unquantized(program, config.preset, tabulate(program, denoiser), provenance)
    plan = QuantPlan(
        config.preset,
        preset.weight_bits,
        preset.activation_bits,
        method,
        effort,
        find_target(config.target).quantized_outputs,
        config.seed,
        config.max_memory,
    )
    settings = {"fingerprint": program.fingerprint, "preset": config.preset, **provenance}
    settings |= {"timesteps": f"{len(denoiser.timesteps)}: {denoiser.timesteps.describe()}"}
    settings |= {"quantized outputs": ", ".join(sorted(plan.quantized_outputs)) or "none"}
    with Checkpoint(keep[0], settings, resume=keep[1]) as checkpoint, repeatable(device):
        there = replace(denoiser, module=module_on(denoiser.module, device))
        with stages.stage("Recording the model's own trajectory") as step:
            recorded = calibrate(there, images=images, seed=config.seed, progress=step)
        weights = None
        if method.timestep_weights == "image":
            with stages.stage("Weighing the timesteps") as step:
                gain = image_gain(there, seed=config.seed, progress=step)
            provenance["image_gain"] = " ".join(f"{value:.3g}" for value in gain.tolist())
            weights = weights_from(gain)
        with stages.stage("Tabulating the timesteps"):
            subject = prepare(program, denoiser, recorded, plan, provenance, weights)
        with stages.stage("Quantizing") as step:
            moved = replace(subject, program=program_on(subject.program, device))
            return subject.program, quantize(moved, plan, step, checkpoint)


def _check_recipe(recipe: QuantRecipe, program: DiffusionProgram, denoiser: Denoiser) -> None:
    if recipe.fingerprint != program.fingerprint:
        raise RecipeError(
            f"the recipe was made from another model than {denoiser.source}; quantize again without --recipe"
        )
    if recipe.tib.timesteps != denoiser.timesteps:
        raise RecipeError(
            f"the recipe is for {len(recipe.tib.timesteps)} steps ({recipe.tib.timesteps.describe()}), "
            f"--steps asks for {len(denoiser.timesteps)} ({denoiser.timesteps.describe()})"
        )


def _load_recipe(path: Path, config: CompileConfig) -> QuantRecipe:
    """Read a recipe, and refuse what was asked for by name and is otherwise in it: it is quantized already."""
    recipe = load_recipe(path)
    asked = config.model_dump(include={"preset", "effort"}, exclude_unset=True)
    asked |= config.method.model_dump(exclude_unset=True)
    made = {**recipe.provenance, "preset": recipe.preset}
    for name, value in asked.items():
        if value != "auto" and str(value) != made.get(name, str(value)):
            raise ConfigError(
                f"{name} {value}: the recipe was made with {made[name]}; leave it out, or quantize without --recipe"
            )
    return recipe


class _Timed:
    """Passes progress on and notes how long each stage took."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        start = time.perf_counter()
        with self._inner.stage(title) as step:
            yield step
        self.seconds[title] = round(time.perf_counter() - start, 2)
