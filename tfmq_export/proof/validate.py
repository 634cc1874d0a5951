"""Validate a bundle: how far images moved, whether features and arithmetic agree, and whether integers really run.

Both models start from the same noise. The full-precision trajectory is recorded once; the compiled
graph is judged on it step by step, and draws its own images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, get_num_threads

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pictures import is_picture
from tfmq_export.bundle.write import replaced_file
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.pages import release_pages
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.capture.rewrites.program_for import program_for
from tfmq_export.config import Thresholds
from tfmq_export.errors import RecipeError
from tfmq_export.models.load import load, source_of
from tfmq_export.pages import release_freed
from tfmq_export.progress import Progress, Silent
from tfmq_export.proof.agreement import Agreement, LockStep
from tfmq_export.proof.float_model import look_at
from tfmq_export.proof.guidance import Guidance, no_guidance
from tfmq_export.proof.judge import judge, require_measurable
from tfmq_export.proof.kernels import KernelCalls, compare_kernels, counted, emulated, few_rows, wrong_kernels
from tfmq_export.proof.lpips import has_lpips, installed, lpips
from tfmq_export.proof.per_step import compare_steps
from tfmq_export.proof.plan import (
    AGREEING,
    ALONE,
    DEFINING,
    READING,
    SAMPLING,
    SERVING,
    STEPPING,
    USUAL_SECONDS,
    ProofPlan,
    measured_cost,
    plan_of,
)
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.proof.speed import CallSpeed, call_speed
from tfmq_export.proof.stated import require_manifest_of
from tfmq_export.proof.states import States, states_of
from tfmq_export.proof.systematic import channel_excess, layer_share
from tfmq_export.proof.temporal_features import TemporalErrors, compare_temporal
from tfmq_export.ptq.walk.calibration import CalibrationStep, evenly, record
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.io import load_recipe
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.realized import realized_by_target
from tfmq_export.runtime.engines.table import ENGINES
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.loaded import load as load_bundle
from tfmq_export.runtime.measure.compare import (
    Comparison,
    Metric,
    Report,
    as_pictures,
    has_ssim,
    psnr,
    ssim,
)
from tfmq_export.runtime.measure.machine import features, processor
from tfmq_export.runtime.measure.receipt import Receipt
from tfmq_export.runtime.self_test import SelfTest
from tfmq_export.target import find_target


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Everything one validation found.

    Attributes:
        report: Comparisons and verdicts.
        receipt: Requested against realized precision.
        temporal: Every served temporal feature against full precision.
        self_test: What the bundle must predict wherever it is served.
        reference_images: Drawn by the full-precision model, [N, C, H, W] in 0..1.
        images: Drawn by the compiled graph from the same noise.
        notes: What looks wrong about the float model, in sentences.
        plan: How much was compared.
        states: On the way to the images, where they are pictures too.
        guidance: What is left of the prompt, where the sampler guides.
        speed: Against PyTorch, where the bundle ran on the engine it was compiled for.
    """

    report: Report
    receipt: Receipt
    temporal: TemporalErrors
    self_test: SelfTest
    reference_images: NDArray[np.float32]
    images: NDArray[np.float32]
    plan: ProofPlan
    notes: tuple[str, ...] = ()
    states: States | None = None
    guidance: Guidance | None = None
    speed: CallSpeed | None = None

    def __repr__(self) -> str:
        verdict = "missed a bound" if self.report.failed else "passed"
        return f"Validation({verdict}, images PSNR {self.report[Metric.IMAGE_PSNR].mean:.1f} dB)"

    def to_json(self) -> dict[str, object]:
        found = {
            "precision": self.receipt.to_json(),
            "temporal": self.temporal.to_json(),
            "guidance": None if self.guidance is None else self.guidance.to_json(),
            "host": {"processor": processor(), "features": features()},
            "speed": None if self.speed is None else self.speed.to_json(),
            "notes": list(self.notes),
            "proof": asdict(self.plan),
        }
        return {**self.report.to_json(), **found, "temporal_tables": self.temporal.storage}

    def write(self, path: Path, extra: Mapping[str, object] | None = None) -> None:
        """Write report.json."""
        with replaced_file(path) as partial:
            partial.write_text(json.dumps({**self.to_json(), **(extra or {})}, indent=1) + "\n", "utf-8")


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is validated, and against what.

    Attributes:
        denoiser: The full-precision model.
        program: Its captured graph.
        recipe: The recipe the bundle was made with.
        bundle: The compiled graph.
    """

    denoiser: Denoiser
    program: DiffusionProgram
    recipe: QuantRecipe
    bundle: Bundle

    def __post_init__(self) -> None:
        if self.recipe.fingerprint != self.program.fingerprint:
            raise RecipeError(
                f"{self.bundle.root} was not compiled from {self.denoiser.source}: the weights or the graph differ"
            )
        if self.recipe.tib.timesteps != self.denoiser.timesteps:
            raise RecipeError(
                f"{self.bundle.root} was compiled for {len(self.recipe.tib.timesteps)} steps "
                f"({self.recipe.tib.timesteps.describe()}), not for {len(self.denoiser.timesteps)} "
                f"({self.denoiser.timesteps.describe()}); give the same --steps"
            )
        require_manifest_of(self.bundle, self.recipe)

    @property
    def carried_out(self) -> QuantRecipe:
        """The recipe as the bundle's target carries it out."""
        manifest = self.bundle.manifest
        return adapt(self.recipe, find_target(manifest.target), manifest.tables)


def subject_of(
    bundle: Bundle,
    model: Path | None,
    factory: str | None = None,
    *,
    variant: str | None = None,
    lora: Sequence[str] = (),
    pipeline: Path | None = None,
) -> Subject:
    """A bundle beside the model it came from, sampled the same way.

    Args:
        model: A folder, a checkpoint, a ``model.pt``, or the weights of ``factory``; None where it has them itself.
        variant: Of the weights in a folder.
        lora: Files that were fused into the weights.
        pipeline: The folder in which the model took the place of the denoiser.
    Raises:
        LoadError: the model cannot be read.
        RecipeError: the bundle was not compiled from it.
    """
    denoiser = load(source_of(bundle, model, factory, variant=variant, lora=lora, pipeline=pipeline))
    recipe = load_recipe(bundle.root)
    return Subject(denoiser, program_for(capture(denoiser), recipe), recipe, bundle)


def validate(  # noqa: PLR0913  # options by keyword
    subject: Subject,
    thresholds: Thresholds,
    *,
    plan: ProofPlan | None = None,
    images: int | None = None,
    budget: float = USUAL_SECONDS,
    seed: int = 1,
    progress: Progress | None = None,
) -> Validation:
    """Measure a bundle against the model it came from.

    Args:
        plan: How much is compared; if None, it follows from a timed call and the next two.
        images: How many, whatever they take; if None, as many as ``budget`` allows and ``USUAL_IMAGES`` at most.
        budget: Seconds that it should take; see ``plan.py``.
        seed: Of the starting noise; another than calibration's.
    Raises:
        ConfigError: a bound on what this model does not have: guidance, or images for LPIPS.
        DependencyError: a bound on LPIPS, whose weights are not installed.
    """
    require_measurable(subject.denoiser, thresholds)
    progress = progress or Silent()
    denoiser, root = subject.denoiser, subject.bundle.root
    if plan is None:
        with progress.stage("Planning the proof"):
            plan = plan_of(measured_cost(denoiser), images, budget)
    runs = denoiser.runs(plan.images, seed, pictures=True)
    few = denoiser.runs(plan.images, seed, first=plan.few, pictures=True)
    with progress.stage(SAMPLING) as step:
        trajectory, reference = record(denoiser, denoiser.module_denoise(), runs, step)
    with progress.stage("Looking at the float model"):
        notes = look_at(denoiser, seed, trajectory, reference)
    release_pages(denoiser.module.parameters())
    calls = KernelCalls.of(denoiser, trajectory)
    # One engine at a time, and the model's weights out of the way: each of the three may be as large as the memory.
    # Whoever calls has written the files, or compared their hashes.
    threads = get_num_threads()  # as many as the model had, so that times can be compared
    with load_bundle(root, self_test=False, verify=False, threads=threads) as loaded:
        with progress.stage(SERVING) as step:
            walked, compiled = record(denoiser, bundle_denoise(loaded), runs, step)
            states = states_of(trajectory, walked, denoiser.sample, compiled)
            del walked
        with progress.stage(STEPPING) as step:
            per_step = compare_steps(denoiser, trajectory, loaded, step)
            if per_step.guidance is None and thresholds.guidance is not None:
                raise no_guidance(denoiser)
            # Where they are all of the images, they are drawn already.
            served = compiled if plan.few == plan.images else record(denoiser, bundle_denoise(loaded), few, _untold)[1]
            in_integers = calls.answers(loaded)
            speed = _speed(subject, loaded, trajectory[0])
    release_freed()
    with (
        progress.stage(DEFINING) as step,
        load_bundle(root, self_test=False, verify=False, integer=False, backend="onnxruntime") as in_float,
    ):
        kernels = compare_kernels(calls, in_integers, calls.answers(in_float))
        _, defined = record(denoiser, bundle_denoise(in_float), few, step)
    release_freed()
    with progress.stage(ALONE):
        wrong = wrong_kernels(subject.bundle)
        self_test = emulated(subject.bundle, kernels.self_test)
    reference_images, compiled_images, peak = as_images(reference, compiled)
    release_pages(denoiser.module.parameters())
    release_freed()
    with progress.stage(AGREEING) as step:
        agreements = _agreements(subject, evenly(trajectory, plan.timesteps), step)
    release_freed()
    with progress.stage(READING):
        receipt = counted(realized_by_target(subject.bundle), wrong)
    temporal = compare_temporal(subject.program, denoiser, subject.carried_out.tib, subject.bundle)
    finite = np.isfinite(np.stack([reference.numpy(), compiled.numpy()]))
    found = {
        Metric.FINITE: finite.reshape(2, plan.images, -1).mean(2),
        Metric.IMAGE_PSNR: psnr(reference_images, compiled_images, peak),
        Metric.STEP_SQNR: per_step.sqnr,
        Metric.KERNELS: kernels.sqnr,
        Metric.KERNELS_AT_ENDS: kernels.extreme,
        Metric.SERVED_IMAGES: _psnr(defined, served),
        Metric.GRAPH_IMAGES: _psnr(reference[: plan.few], defined),
        Metric.OTHER_PICTURES: _others(reference_images, peak),
        Metric.FEATURE_COSINE: _or_one(temporal.cosine),
        Metric.TABLE_EXACTNESS: _or_one(temporal.exact.astype(np.float64)),
        **_by_metric(agreements),
    }
    # Signals, points and tiny images have no SSIM; where one is demanded all the same, ssim says so.
    if has_ssim(reference_images) or thresholds.ssim > 0:
        found[Metric.IMAGE_SSIM] = ssim(reference_images, compiled_images, peak)
    if thresholds.lpips is not None or (installed() and has_lpips(reference_images)):
        found[Metric.IMAGE_LPIPS] = lpips(reference_images, compiled_images)
    if per_step.guidance is not None:
        found[Metric.GUIDANCE], found[Metric.GUIDANCE_SNR] = per_step.guidance.kept, per_step.guidance.snr
    report = judge({metric: Comparison.of(metric, values) for metric, values in found.items()}, subject, thresholds)
    return Validation(
        report,
        receipt,
        temporal,
        self_test,
        reference_images,
        compiled_images,
        plan,
        tuple(notes),
        states,
        per_step.guidance,
        speed,
    )


def _speed(subject: Subject, loaded: LoadedBundle, recorded: CalibrationStep) -> CallSpeed | None:
    """None where what runs here is not what the bundle is for."""
    target = find_target(subject.bundle.manifest.target)
    if ENGINES[target.engine].built or not target.integers:
        return None
    found = call_speed(subject.denoiser, loaded, recorded.inputs)
    release_pages(subject.denoiser.module.parameters())
    return found


def _by_metric(agreements: Sequence[Agreement]) -> dict[Metric, NDArray[np.float64]]:
    return {
        Metric.LOCK_STEP: np.array([each.sqnr for each in agreements]),
        Metric.FREE_RUNNING: np.array([each.free_sqnr for each in agreements]),
        Metric.CODE_STEPS: np.array([each.code_steps for each in agreements]),
        Metric.MISMATCH_RATE: np.array([each.mismatch_rate for each in agreements]),
        Metric.CHANNEL_EXCESS: channel_excess(agreements),
        Metric.LAYER_SHARE: layer_share(agreements),
    }


def _psnr(reference: Tensor, images: Tensor) -> NDArray[np.float64]:
    return psnr(*as_images(reference, images))


def _others(images: NDArray[np.float32], peak: float) -> NDArray[np.float64]:
    """PSNR of each image against the next one: what a picture of the same kind reaches by chance."""
    return psnr(images, np.roll(images, 1, 0), peak)


def _untold(done: int, total: int) -> None:
    """A small part of a stage."""


def _or_one(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """All values; 1 for a model without temporal features."""
    return values.reshape(-1) if values.size else np.ones(1)


def as_images(reference: Tensor, compiled: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Both batches as pictures in 0..1, or as they are where they are latents; and the peak for PSNR."""
    if is_picture(reference.shape):
        return as_pictures(reference.numpy()), as_pictures(compiled.numpy()), 1.0
    span = float(reference.max() - reference.min())
    shaped = [
        batch.reshape(len(batch), -1, *batch.shape[-2:]) if batch.ndim > 4 else batch for batch in (reference, compiled)
    ]
    return shaped[0].numpy(), shaped[1].numpy(), span


def _agreements(subject: Subject, trajectory: tuple[CalibrationStep, ...], step: Any) -> list[Agreement]:
    calls = [few_rows(recorded.inputs) for recorded in trajectory]
    found = []
    with LockStep(subject.program, subject.carried_out, subject.bundle) as lock_step:
        for agreement in lock_step.compare(calls):
            found.append(agreement)
            step(len(found), len(calls))
    return found
