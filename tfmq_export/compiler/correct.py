"""The last step of quantization: a correction of the prediction, where it holds (``ptq/walk/closed_loop.py``)."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser, SeededSampler, first_tensor
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.compiler.plan import calibration_images
from tfmq_export.config import CompileConfig
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.progress import Progress
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq.walk.block_runner import rows_at_once
from tfmq_export.ptq.walk.closed_loop import ClosedLoop, Drawing, Used, fit_in_closed_loop
from tfmq_export.ptq.walk.row_sum import row_sum
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import find_target

CORRECTING = "Correcting the predictions"
HELD_OUT = 16  # images that decide, at most
FITTED = 16  # images at most: three numbers per channel and timestep need no more
LEAST = 4  # images; what two or three have in common is mostly chance
OTHER_SEED = 2  # beside the seeds of calibration and proof


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Images that are drawn for the fit, all in one run.

    Attributes:
        fitted: Images it is fitted on.
        held_out: Images that decide.
    """

    fitted: int
    held_out: int

    @classmethod
    def of(cls, config: CompileConfig) -> "Trajectories":
        """As many to fit on as are calibrated on, within bounds."""
        fitted = min(FITTED, calibration_images(config))
        return cls(fitted, min(HELD_OUT, 2 * fitted))

    @property
    def images(self) -> int:
        return self.fitted + self.held_out


def correct(
    denoiser: Denoiser, program: DiffusionProgram, recipe: QuantRecipe, config: CompileConfig, progress: Progress
) -> QuantRecipe:
    """The recipe with a correction, or with the reason why it has none in its provenance.

    Args:
        program: In the recipe's form, where it is to be computed.
    """
    if not config.method.closed_loop or not recipe.layers:
        return recipe
    used = _why_not(denoiser, program, config) or how_rows_are_used(denoiser)
    if isinstance(used, str):
        return _noted(recipe, f"none: {used}")
    target, drawn = find_target(config.target), Trajectories.of(config)
    simulation = Simulation(program, adapt(recipe, target), integer_bias=target.integer_bias)

    def quantized(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        return simulation(denoiser.inputs(sample, timestep, conditioning))

    run, rows = denoiser.run_together(drawn.images, config.seed + OTHER_SEED), rows_at_once(program.module.graph.nodes)
    with progress.stage(CORRECTING) as step:
        found = fit_in_closed_loop(denoiser, quantized, Drawing(run, used, drawn.fitted, rows), step)
    if not found.holds:
        return _noted(recipe, f"none: {_gained(found)}, and that is no gain to keep")
    correction = Correction(found.rows.numpy(), target.quantized_outputs)
    timesteps = f"{correction.corrected} of {len(correction.rows)} timesteps"
    return replace(_noted(recipe, f"{timesteps}; {_gained(found)}"), correction=correction)


def will_correct(denoiser: Denoiser, program: DiffusionProgram, config: CompileConfig) -> bool:
    """Whether a correction will be fitted, as far as is known before a pipeline's sampler is asked."""
    return config.method.closed_loop and not _why_not(denoiser, program, config)


def cannot_correct(denoiser: Denoiser, program: DiffusionProgram) -> str:
    """Why predictions cannot be corrected; empty where they can."""
    sampler = denoiser.sampler
    if not program.features:
        return "the model has no table of timesteps that could hold it"
    if not _alike(denoiser, program):
        return "its prediction is not shaped like the sample, channels first"
    if isinstance(sampler, DiffusersSampler):
        once = len(sampler.walk) == len(denoiser.timesteps)
        return "" if once else "its sampler visits a timestep twice, and a row has one correction"
    if not isinstance(sampler, SeededSampler):
        return "its sampler is its own code, whose guidance is not known"
    if sampler.together < 2:
        return "its sampler draws one image at a time, and a fit needs all of them at the same step"
    return ""


def how_rows_are_used(denoiser: Denoiser) -> Used | str:
    """The prediction that a step is taken with, of the rows of a call; or why that is not known."""
    sampler = denoiser.sampler
    return sampler.used if isinstance(sampler, DiffusersSampler) else row_sum(denoiser, OTHER_SEED)


def _why_not(denoiser: Denoiser, program: DiffusionProgram, config: CompileConfig) -> str:
    """Why there will be no correction, by target, images or model; empty where one is fitted."""
    if find_target(config.target).integers_only:
        return f"{config.target} computes in integers alone, and a correction is a factor in floating point"
    fitted = Trajectories.of(config).fitted
    if fitted < LEAST:
        return f"it is fitted on as many images as are calibrated on, {fitted}, and needs {LEAST}"
    return cannot_correct(denoiser, program)


def _alike(denoiser: Denoiser, program: DiffusionProgram) -> bool:
    """Whether the prediction has the sample's shape: a picture or a film, channels first."""
    (output,) = [node for node in program.module.graph.nodes if node.op == "output"]
    prediction = first_tensor([node.meta["val"] for node in output.all_input_nodes])
    sample = denoiser.example_inputs[denoiser.sample]
    return sample.ndim > 3 and prediction.shape[1:] == sample.shape[1:]


def _gained(found: ClosedLoop) -> str:
    gain = f"{len(found.gain)} held-out images gain {float(found.gain.mean()):.2f} +- {found.uncertainty:.2f} dB"
    return gain if found.loss < 1 else f"{gain}, predictions on full precision's path lose {found.loss:.1f}"


def _noted(recipe: QuantRecipe, said: str) -> QuantRecipe:
    return replace(recipe, provenance={**recipe.provenance, "correction": said})
