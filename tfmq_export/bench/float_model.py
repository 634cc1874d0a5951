"""The float model that bundles came from, in PyTorch: what most baselines run, and what predictions are judged by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bench.job import PREDICTION
from tfmq_export.bench.peers import Rows, batches_of, export_float
from tfmq_export.bench.workshop import CALIBRATION_SEED
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import capture
from tfmq_export.errors import RecipeError
from tfmq_export.models.load import Source, load
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate, evenly

IMAGES = 4
"""Trajectories that peers are calibrated with, and as many to judge on."""
CALIBRATION_ROWS = 32
"""Calls that peers are calibrated with, spread over the schedule."""
HELD_OUT_STEPS = 16
"""Timesteps that predictions are judged at, likewise."""


@dataclass(frozen=True)
class Model:
    """The float model behind the bundles, loaded when something asks for it."""

    source: Source

    @cached_property
    def denoiser(self) -> Denoiser:
        return load(self.source)

    @cached_property
    def fingerprint(self) -> str:
        return capture(self.denoiser).fingerprint

    @property
    def scalar_timestep(self) -> bool:
        """Whether its timestep is a number, not one per sample."""
        return self.denoiser.example_inputs[self.denoiser.timestep].ndim == 0

    def require_origin_of(self, bundle: Bundle) -> None:
        """Raise RecipeError if the bundle was compiled from another model."""
        if self.fingerprint != bundle.manifest.fingerprint:
            raise RecipeError(f"{bundle.root} was not compiled from {self.source.name}; give the model it came from")

    def export(self, path: Path, batch: int) -> None:
        """Write the graph that torch exports, for calls of this size."""
        export_float(self.denoiser, path, batch)

    def rows(self, batch: int) -> Rows:
        """Recorded calls to calibrate peers on, evenly over the schedule."""
        steps = self._recorded(CALIBRATION_SEED, batch)
        return evenly([call for step in steps for call in batches_of(step, batch)], CALIBRATION_ROWS)

    def held_out(self, seed: int, batch: int) -> Sequence[dict[str, NDArray[Any]]]:
        """Recorded calls with their predictions, for some timesteps evenly over the schedule; as ``Job`` says."""
        return [held_out_calls(step, batch) for step in evenly(self._recorded(seed, batch), HELD_OUT_STEPS)]

    def fields(self) -> dict[str, Any]:
        """Of its source, as JSON takes them, valid from any working directory."""
        found = asdict(self.source).items()
        return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in found}

    def _recorded(self, seed: int, batch: int) -> Sequence[CalibrationStep]:
        images = -(-IMAGES // batch) * batch
        return calibrate(self.denoiser, images=images, seed=seed, progress=lambda done, total: None)


def held_out_calls(step: CalibrationStep, batch: int) -> dict[str, NDArray[Any]]:
    """One timestep of a trajectory as calls of this size, beside what the float model predicts."""
    calls = batches_of(step, batch)
    arrays = {name: np.stack([call[name] for call in calls]) for name in step.inputs}
    return {**arrays, PREDICTION: step.prediction[: len(calls) * batch].numpy()}
