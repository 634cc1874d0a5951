"""The trained example models, captured once for all tests that only look: it takes seconds."""

import functools
from pathlib import Path

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.models.load import Source, load

EXAMPLES = Path(__file__).parents[2] / "examples"


@functools.cache
def captured_example(name: str, steps: int = 20) -> tuple[Denoiser, DiffusionProgram]:
    """``emoji32`` or ``emoji32-cond``; nobody may change the program."""
    denoiser = load(Source(EXAMPLES / name / "model.pt", steps=steps))
    return denoiser, capture(denoiser)
