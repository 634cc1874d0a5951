"""What is quantized, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.skip_concat import find_skip_concats, split_skip_concats
from tfmq_export.capture.rewrites.spell_attention import spell_attention
from tfmq_export.config import Method
from tfmq_export.ptq.tib import tabulate
from tfmq_export.ptq.walk.calibration import CalibrationRows, CalibrationStep, pick_rows
from tfmq_export.ptq.walk.effort import Effort
from tfmq_export.ptq.walk.widths import Widths
from tfmq_export.recipe.recipe import SkipSplit, TibRecipe


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """What to quantize, and how.

    Attributes:
        preset: Its name.
        weight_bits: 0 leaves every layer in floating point.
        activation_bits: Of layer inputs. Some layers take 8 all the same (``walk/codes.py``).
        method: Which ideas are in force.
        effort: How long they may take.
        quantized_outputs: Kinds of layer whose output the target wants on a grid.
        seed: Of every random choice.
        max_memory: Bytes of cached activations to hold in memory; None is no ceiling.
        widths: Of layers that do not take the bits above, by the value they compute.
    """

    preset: str
    weight_bits: int
    activation_bits: int
    method: Method
    effort: Effort
    quantized_outputs: frozenset[str] = frozenset()
    seed: int = 0
    max_memory: int | None = None
    widths: Mapping[str, Widths] = field(default_factory=dict)

    @property
    def follows_original(self) -> bool:
        """Whether blocks are held to what the full-precision network computes, which then is walked beside."""
        method, effort = self.method, self.effort
        learned = (method.reconstruct and effort.rounding.iterations) or (
            method.learned_steps and effort.step_iterations
        )
        return bool(learned) or self.reads_original

    @property
    def reads_original(self) -> bool:
        """Whether layers are told what they would read in the full-precision network."""
        return self.method.error_feedback and self.method.asymmetric_feedback

    @property
    def flows(self) -> int:
        """Networks that are walked: the quantized one, and the full-precision one where it is followed."""
        return 2 if self.follows_original else 1

    @property
    def ceiling(self) -> int | None:
        """Bytes in memory of each cache: one for the activations of each network, one for the inputs inside a block."""
        return None if self.max_memory is None else self.max_memory // (self.flows + 1)


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedModel:
    """What is quantized.

    Attributes:
        program: With its skip concatenations split already, and its attention spelled out where it is quantized.
        denoiser: The model it was captured from.
        rows: Samples of the model's own trajectory.
        exact: Temporal features in full precision.
        splits: What was split.
        provenance: For the recipe.
    """

    program: DiffusionProgram
    denoiser: Denoiser
    rows: CalibrationRows
    exact: TibRecipe
    splits: tuple[SkipSplit, ...]
    provenance: Mapping[str, str]


def prepare(
    program: DiffusionProgram,
    denoiser: Denoiser,
    recorded: Sequence[CalibrationStep],
    plan: QuantPlan,
    provenance: Mapping[str, str],
    weights: Tensor | None = None,
) -> CalibratedModel:
    """Bring a captured model and its recorded trajectory together.

    Args:
        recorded: From ``calibrate``.
        weights: How much each timestep counts, [T]; None: all the same.
    """
    exact = tabulate(program, denoiser)
    splits = find_skip_concats(program) if plan.method.split_skips else ()
    rows = pick_rows(denoiser, recorded, plan.effort.rows_per_timestep, weights)
    if plan.method.attention == "integer":
        program = spell_attention(program)
    return CalibratedModel(split_skip_concats(program, splits), denoiser, rows, exact, splits, provenance)
