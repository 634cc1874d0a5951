"""The chain, on one screen: capture, quantize, lower, write, prove."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.bundle.write import replaced_folder
from tfmq_export.capture.device import find_device
from tfmq_export.compiler.auto import compile_auto
from tfmq_export.compiler.forecast import Expected, Forecast, forecast, refuse_what_cannot_fit
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.making import WRITING, Making, Stage, Stopwatch
from tfmq_export.compiler.on_engine import require_engine_takes
from tfmq_export.compiler.output import evidence_kept, require_writable, sole_run
from tfmq_export.compiler.settings import check_settings, recipe_as_asked
from tfmq_export.compiler.steps import Model, capture, load_model, lower, prove, quantize, reuse, write
from tfmq_export.config import CompileConfig, find_preset
from tfmq_export.errors import ConfigError, OutputError
from tfmq_export.models.recorded.load import Draw
from tfmq_export.progress import Progress, Silent
from tfmq_export.proof.judge import require_measurable
from tfmq_export.proof.validate import Validation
from tfmq_export.report.bundle_page import notebook_of
from tfmq_export.report.facts import Facts
from tfmq_export.runtime.engines.open import require_engine
from tfmq_export.target import find_target


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ``tfmq_export.compile`` made.

    Attributes:
        bundle: The output folder.
        validation: The proof that went into its report.
        stages: Time and memory of each.
    """

    bundle: Bundle
    validation: Validation
    stages: tuple[Stage, ...] = field(repr=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each stage, by its title."""
        return {stage.title: stage.seconds for stage in self.stages}

    def _repr_html_(self) -> str:
        """What a notebook shows: the top of the report."""
        return notebook_of(Facts.read(self.bundle.root))


def compile_model(  # noqa: PLR0913  # options of the one public entry, by keyword
    model: Model | nn.Module,
    output: str | Path,
    config: CompileConfig | None = None,
    *,
    draw: Draw | None = None,
    recipe: Path | None = None,
    resume: bool = False,
    dump_dir: Path | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Compiled:
    """Compile a diffusion model into a bundle, and prove it.

    Args:
        model: A path (diffusers folder, pipeline folder or ``model.pt``), a ``Source`` with more options, or any
            module with ``draw`` or its ``Description``.
        output: The bundle's folder; an older bundle there is replaced at the very end.
        draw: With a module alone: ``draw(seed) -> image`` runs your own sampler with the module inside. How it calls
            the module is recorded; nothing else needs to be said. The module is left in float32, for evaluation.
        config: Preset, target, effort and all else that the command line knows; w8a8 for ``ort-cpu`` if None.
        recipe: Take the recipe of this bundle or file instead of quantizing again.
        resume: Go on where an interrupted run with this output and these settings stopped.
        dump_dir: Save the graph after each pass here.
        progress: Told of each stage and how far it is; silent if None.
        command: What the report names as the command that makes the bundle again.
    Returns:
        The bundle, the proof that went into its report, and what each stage took.
    Raises:
        LoadError: the model cannot be read.
        ConfigError: options that do not fit together, or a schedule that cannot be walked.
        DependencyError: the target's engine, or what a threshold needs, is not installed.
        TargetError: the target cannot run what is asked for, or its engine not this model; known before any long
            work.
        ExportError: the model cannot be captured.
        RecipeError: the recipe was made from another model or schedule.
        BuildError: the engine refused the graph.
        PrecisionError: a layer would not run in the integers asked for.
        AccuracyError: a threshold was missed. Nothing half-written is left behind; report, pictures and recipe are in
            ``NAME.failed`` beside the output, finished blocks in ``.NAME.checkpoint``, for ``resume``.
        OutputError: the output cannot be written, or another run is writing it.
    """
    config, root, stages = config or CompileConfig(), Path(output), Stopwatch(progress or Silent())
    _refuse_early(config, root)
    given = None if recipe is None else recipe_as_asked(recipe, config)
    kept = checkpoint_of(root)
    denoiser = load_model(_with_code(model, draw), config.components, stages, decoder=config.decoder)
    require_measurable(denoiser, config.thresholds)
    with sole_run(root), replaced_folder(root) as partial, evidence_kept(partial, root):
        captured, expected = capture(denoiser, stages), None
        if given is None:
            _ask_engine(captured, config, stages)
        if not config.auto:
            with stages.stage("Forecasting"):
                expected = forecast(captured, config, quantized=given is not None)
                refuse_what_cannot_fit(expected, root)
            stages.expect(expected.by_title)
        making = Making(stages.stages, command, {} if expected is None else expected.to_json())
        if config.auto:
            validation = compile_auto(
                captured,
                config,
                partial,
                checkpoint=kept,
                resume=resume,
                dump_dir=dump_dir,
                making=making,
                progress=stages,
            )
        else:
            if given is None:
                made = quantize(captured, config, checkpoint=kept, resume=resume, progress=stages)
            else:
                made = reuse(captured, given, config)
            lowered = lower(made, config, dump_dir=dump_dir, progress=stages)
            with stages.stage(WRITING):
                bundle = write(lowered, partial, config.components, decoder=config.decoder)
            plan = None if expected is None else expected.proof
            validation = prove(made, bundle, config, plan=plan, making=making, progress=stages)
    shutil.rmtree(kept, ignore_errors=True)  # only now is its work safe
    return Compiled(open_bundle(root), validation, tuple(stages.stages))


def foresee(
    model: Model,
    output: str | Path,
    config: CompileConfig | None = None,
    *,
    recipe: Path | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """What ``compile_model`` with these arguments would take: the model is loaded and captured, and nothing written.

    Raises:
        OutputError: it would fill the disk, or cannot be written.
        LoadError, ConfigError, DependencyError, TargetError, ExportError, RecipeError: as ``compile_model``.
    """
    config, root, stages = config or CompileConfig(), Path(output), Stopwatch(progress or Silent())
    if config.auto:
        raise ConfigError("--auto compiles until its goal is met, so nobody knows how often; leave out --dry-run")
    _refuse_early(config, root)
    require_writable(root)
    given = None if recipe is None else recipe_as_asked(recipe, config)
    denoiser = load_model(model, config.components, stages, decoder=config.decoder)
    require_measurable(denoiser, config.thresholds)
    captured = capture(denoiser, stages)
    if given is not None:
        reuse(captured, given, config)
    else:
        _ask_engine(captured, config, stages)
    with stages.stage("Forecasting"):
        expected = forecast(captured, config, quantized=given is not None)
    refuse_what_cannot_fit(expected, root)
    done = tuple(Expected(each.title, each.seconds, each.peak_memory_bytes or 0) for each in stages.stages)
    return replace(expected, done=done)


def _with_code(model: Model | nn.Module, draw: Draw | None) -> Model:
    if not isinstance(model, nn.Module):
        if draw is not None:
            raise ConfigError("draw belongs to a module; a file or folder brings its own sampler")
        return model
    if draw is None:
        raise ConfigError("a module alone says nothing of how images are drawn; give draw=function(seed) -> image")
    return model, draw


def checkpoint_of(root: Path) -> Path:
    """Where the finished blocks of an interrupted run wait."""
    return root.absolute().with_name(f".{root.absolute().name}.checkpoint")


def _ask_engine(captured: Captured, config: CompileConfig, progress: Progress) -> None:
    """Find out now whether the target's engine takes this model; without quantizing, the proof comes at once anyway."""
    if find_target(config.target).integers_only:
        return  # nothing to ask in floating point
    if config.auto or find_preset(config.preset).weight_bits:
        with progress.stage("Asking the engine"):
            require_engine_takes(captured, config)


def _refuse_early(config: CompileConfig, root: Path) -> None:
    """What would be refused after an hour is refused now."""
    if not root.absolute().name:
        raise OutputError(f"{root}: no folder that could be replaced; choose another -o")
    target = find_target(config.target)
    require_engine(target)
    check_settings(config, target)
    find_device(config.device)
