"""The forms a model takes on its way through the compiler; each step makes one from the one before."""

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.compiler.prologue import Prologue
from tfmq_export.passes.base import PassReport
from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.recipe.recipe import QuantRecipe, TableType
from tfmq_export.target import Target


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A model and its graph, in full precision; nothing changes it, so many recipes can be made from one."""

    denoiser: Denoiser
    program: DiffusionProgram


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What the full-precision model does on its own trajectory.

    Attributes:
        calls: Every model call of some images drawn together.
        gain: What an error at each timestep does to the image, float64 [T]; None where nobody asks.
    """

    calls: tuple[CalibrationStep, ...] = field(repr=False)
    gain: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A recipe and what it is for; it can be lowered for many targets.

    Attributes:
        program: In the recipe's form: skip concatenations split, attention spelled out where it is quantized.
    """

    denoiser: Denoiser
    program: DiffusionProgram
    recipe: QuantRecipe


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """The graph of one target, not yet in a file.

    Attributes:
        made: What it was lowered from.
        graph: The denoiser; weights that no pass replaced are the module's own.
        reports: What each pass did.
        prologue: The graph that runs once per prompt, where it was asked for.
        tables: What rows of temporal tables are stored in.
    """

    made: Quantized
    target: Target
    graph: gs.Graph = field(repr=False)
    reports: tuple[PassReport, ...] = field(repr=False)
    prologue: Prologue | None = field(default=None, repr=False)
    tables: TableType = "fp32"
