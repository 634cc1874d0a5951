"""``--auto``: the bits of each layer from measured sensitivity, verified by compiling them."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.compiler.forms import Captured, Observed, Quantized
from tfmq_export.compiler.making import WRITING, Making
from tfmq_export.compiler.plan import layers_pinned
from tfmq_export.compiler.steps import lower, observe, prove, quantize, write
from tfmq_export.compiler.write import write_graph
from tfmq_export.config import CompileConfig
from tfmq_export.errors import AccuracyError
from tfmq_export.progress import Progress
from tfmq_export.proof.validate import Validation
from tfmq_export.ptq.image_gain import weights_from
from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import TableType
from tfmq_export.report.measured import Measured
from tfmq_export.report.numbers import milliseconds as in_ms
from tfmq_export.report.numbers import size as in_words
from tfmq_export.runtime.measure.compare import Metric
from tfmq_export.search.latency import Latency, call_seconds, latency_between
from tfmq_export.search.plan import BitsPlan, Goal, Misses, plan_bits
from tfmq_export.search.sensitivity import weighted_batches
from tfmq_export.search.sites import IN_FLOAT
from tfmq_export.search.survey import Drafts, Survey, survey
from tfmq_export.target import find_target

TRIES = 4
"""Whole compiles at most."""


def goal_of(config: CompileConfig) -> Goal:
    """What ``--auto`` is to reach."""
    return Goal(
        config.thresholds.psnr, config.max_size, None if config.max_latency is None else config.max_latency / 1e3
    )


def look_at_layers(model: Captured, seen: Observed, config: CompileConfig, progress: Progress) -> Survey:
    """Measure what each choice of bits costs, on two drafts in closed form."""
    target, pins = find_target(config.target), layers_pinned(model.program, config)
    wide, narrow = (_draft(model, seen, config, preset, progress) for preset in ("w8a8", "w4a8"))
    kinds = _tables(config)
    with progress.stage("Counting bytes") as step:
        sizes: dict[TableType, int] = {}
        for done, kind in enumerate(kinds, start=1):
            sizes[kind] = _graph_bytes(wide, config.model_copy(update={"tables": kind}))
            step(done, len(kinds) + 1)
        narrow_bytes = _graph_bytes(narrow, config.model_copy(update={"tables": kinds[0]}))
    weights = None if seen.gain is None else weights_from(seen.gain)
    found = survey(
        Drafts(wide.program, adapt(wide.recipe, target), adapt(narrow.recipe, target), sizes, narrow_bytes),
        model.denoiser,
        weighted_batches(model.denoiser, wide.program, seen.calls, weights),
        pins,
        target=target,
        seed=config.seed,
        progress=progress,
    )
    if config.max_latency is None:
        return found
    with progress.stage("Timing the drafts"):
        return replace(found, latency=_latency(model, seen, config, wide, found))


def _latency(model: Captured, seen: Observed, config: CompileConfig, wide: Quantized, found: Survey) -> Latency:
    """Of the wide draft, and of one with every layer in floating point that may be."""
    free = {site.name: site for site in found.sites if any(inputs == FLOAT for _, inputs in site.bits)}
    widths = layers_pinned(model.program, config) | {name: Widths(8, FLOAT, "", IN_FLOAT) for name in free}
    method = config.method.model_copy(update={"closed_loop": False})  # only its time counts
    asked = _as_draft(config, "w8a8").model_copy(update={"method": method})
    with tempfile.TemporaryDirectory() as folder:
        floating = quantize(model, asked, observed=seen, widths=widths)
        bundles = [
            write(lower(made, asked), Path(folder) / name) for name, made in (("integers", wide), ("float", floating))
        ]
        work = sum(max(choice.cost for choice in site.choices) for site in free.values())
        return latency_between(bundles[0], bundles[1], model.denoiser, work)


def compile_auto(  # noqa: PLR0913  # what the chain has in hand
    model: Captured,
    config: CompileConfig,
    root: Path,
    *,
    checkpoint: Path,
    resume: bool,
    dump_dir: Path | None,
    making: Making,
    progress: Progress,
) -> Validation:
    """Choose bits, compile them, and choose more where the bundle misses the goal.

    Args:
        root: An empty folder; holds the bundle in the end.
        checkpoint: Where the finished blocks of each choice are kept.
        dump_dir: Save the graph after each pass here, of the latest choice.
    Raises:
        ConfigError: nothing is as small as was asked.
        AccuracyError: the goal was missed ``TRIES`` times.
    """
    goal, misses = goal_of(config), Misses()
    seen = observe(model.denoiser, config, progress)
    measured = look_at_layers(model, seen, config, progress)
    pins = layers_pinned(model.program, config)
    for attempt in range(1, TRIES + 1):
        plan = plan_bits(measured, goal, pins, misses)
        with progress.stage(f"Choice {attempt}: {plan.describe()}"):
            asked = config.model_copy(update={"tables": plan.tables})
        notes = {"goal": goal.describe(), "choice": f"{plan.describe()} (choice {attempt})"}
        with _gone_if_empty(checkpoint):
            made = quantize(
                model,
                asked,
                observed=seen,
                widths=plan.widths,
                notes=notes,
                checkpoint=checkpoint / _key(plan),  # each has its own bits, which a checkpoint holds to
                resume=resume,
                progress=progress,
            )
        lowered = lower(made, asked, dump_dir=dump_dir, progress=progress)
        shutil.rmtree(root)  # an earlier choice
        with progress.stage(WRITING):
            bundle = write(lowered, root, asked.components, decoder=asked.decoder)
        last = attempt == TRIES
        misses, said = _measured(bundle, model.denoiser, goal, plan, misses)
        if said:
            if last:
                raise AccuracyError(f"{said}, after {TRIES} choices of bits; allow more")
            with progress.stage(f"Missed: {said}"):
                continue
        try:
            return prove(made, bundle, asked, making=making, progress=progress)
        except AccuracyError:
            found = Measured.read(bundle).mean(Metric.IMAGE_PSNR)
            if found is None or goal.psnr is None or found >= goal.psnr or last or _nothing_left(plan, goal):
                raise
            misses = replace(misses, psnr=misses.psnr + found - plan.psnr)
            with progress.stage(f"Missed: the images have {found:.1f} dB, {goal.psnr:g} wanted"):
                pass
    raise AssertionError("the last try returns or raises")


def _key(plan: BitsPlan) -> str:
    """Name of a choice by its bits: what a call is expected to take is timed anew in every run."""
    chosen = sorted((name, x.weights, x.inputs) for name, x in plan.widths.items())
    return f"choice-{hashlib.sha256(repr((chosen, plan.tables)).encode()).hexdigest()[:12]}"


def _measured(bundle: Bundle, denoiser: Denoiser, goal: Goal, plan: BitsPlan, misses: Misses) -> tuple[Misses, str]:
    """How far a bundle's size and time are from what was expected, and which bound it misses, in words."""
    size, said = _bundle_bytes(bundle), ""
    misses = replace(misses, size=misses.size + size - plan.size)
    if goal.size is not None and size > goal.size:
        said = f"the graph has {in_words(size)}, --max-size allows {in_words(goal.size)}"
    elif goal.seconds is not None and plan.seconds is not None:
        (taken,) = call_seconds((bundle,), denoiser)
        misses = replace(misses, seconds=misses.seconds + taken - plan.seconds)
        if taken > goal.seconds:
            said = f"a call takes {in_ms(taken)}, --max-latency allows {in_ms(goal.seconds)}"
    return misses, said


@contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """No folder is left of a run that was stopped before it had anything to go on from."""
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _nothing_left(plan: BitsPlan, goal: Goal) -> bool:
    """Whether the choice was the best there is, so that another one would be the same."""
    return goal.psnr is not None and plan.psnr < goal.psnr


def _draft(model: Captured, seen: Observed, config: CompileConfig, preset: str, progress: Progress) -> Quantized:
    asked = _as_draft(config, preset)
    with progress.stage(f"Drafting {preset}"):
        return quantize(model, asked, observed=seen)


def _as_draft(config: CompileConfig, preset: str) -> CompileConfig:
    method = config.method.model_copy(update={"sharp_weights": False})  # each layer has both widths to choose from
    return config.model_copy(
        update={"preset": preset, "effort": "fast", "auto": False, "components": "none", "method": method}
    )


def _graph_bytes(made: Quantized, config: CompileConfig) -> int:
    """What the graphs of a recipe take on the disk."""
    lowered = lower(made, config)
    graphs = [lowered.graph] if lowered.prologue is None else [lowered.graph, lowered.prologue.graph]
    with tempfile.TemporaryDirectory() as folder:
        for number, graph in enumerate(graphs):
            (Path(folder) / str(number)).mkdir()
            write_graph(graph, Path(folder) / str(number), lowered)
        return sum(path.stat().st_size for path in Path(folder).glob("*/*"))


def _bundle_bytes(bundle: Bundle) -> int:
    return sum(path.stat().st_size for graph in bundle.graphs for path in graph.parent.glob("model.onnx*"))


def _tables(config: CompileConfig) -> tuple[TableType, ...]:
    """What tables may be stored in: as asked, else whatever the target has."""
    if "tables" in config.model_fields_set:
        return (config.tables,)
    return ("fp32", "fp16", "int8") if find_target(config.target).integer_tables else ("fp32", "fp16")
