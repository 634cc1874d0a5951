"""The compiled graph on every call of the full-precision trajectory: the same inputs to both, so no drift counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.progress import Step
from tfmq_export.proof.guidance import Guidance, GuidanceMeter
from tfmq_export.proof.served import run_bundle
from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.compare import sqnr_db


@dataclass(frozen=True, slots=True, eq=False)
class PerStep:
    """What the graph's predictions are worth.

    Attributes:
        sqnr: Of each call, dB, [calls].
        guidance: None where the sampler does not guide.
    """

    sqnr: NDArray[np.float64]
    guidance: Guidance | None


def compare_steps(
    denoiser: Denoiser, trajectory: Sequence[CalibrationStep], loaded: LoadedBundle, step: Step
) -> PerStep:
    """Call the graph once for each call that was recorded."""
    found, guidance = [], GuidanceMeter(denoiser)
    for done, recorded in enumerate(trajectory, start=1):
        predicted = run_bundle(loaded, denoiser, recorded.inputs)
        found.append(sqnr_db(recorded.prediction.numpy(), predicted))
        guidance.add(recorded.inputs, recorded.prediction, torch.from_numpy(predicted))
        step(done, len(trajectory))
    return PerStep(np.array(found), guidance.found())
