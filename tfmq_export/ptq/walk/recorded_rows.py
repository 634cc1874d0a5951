"""The recorded trajectory in place of the network: what was predicted once is not predicted again."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.errors import CalibrationError
from tfmq_export.ptq.walk.calibration import CalibrationStep

Inputs = Mapping[str, Tensor]
"""Arguments of the module by name, [N, ...]; one without a batch axis serves all rows."""


class RecordedRows:
    """Predictions by what they were made from, whatever rows stood beside them.

    Args:
        calls: From ``calibrate``.
    """

    def __init__(self, calls: Sequence[CalibrationStep]) -> None:
        self._predictions = {
            _digest(step.inputs, row): step.prediction[row] for step in calls for row in range(len(step.prediction))
        }

    def find(self, inputs: Inputs, count: int) -> list[Tensor | None]:
        """The prediction for each of ``count`` rows; None where none was recorded."""
        return [self._predictions.get(_digest(inputs, row)) for row in range(count)]


class Replay:
    """One run, from memory where it is as recorded.

    Args:
        plain: Predicts what was not recorded.
        coarse: Predicts one image, in place of the record, at the calls in ``window``.
        image: Which of the run's; its rows are those that show the same sample.
    """

    def __init__(
        self, denoiser: Denoiser, recorded: RecordedRows, plain: Denoise, coarse: Denoise, window: range, image: int
    ) -> None:
        self._denoiser, self._recorded, self._plain, self._coarse = denoiser, recorded, plain, coarse
        self._window, self._image = window, image
        self.visited: list[float] = []
        """Timestep of every call so far."""
        self.power: float | None = None
        """Mean square of the error in the first disturbed call; None before it."""

    def __call__(self, sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        """Predict.

        Raises:
            CalibrationError: the run is another one before anything was disturbed.
        """
        inputs = self._denoiser.inputs(sample, timestep, conditioning)
        place = len(self.visited)
        self.visited.append(float(inputs[self._denoiser.timestep].reshape(-1)[0]))
        found = self._recorded.find(inputs, len(sample))
        changed = torch.tensor([known is None for known in found])
        if self.power is None and changed.any():
            raise CalibrationError(
                f"{self._denoiser.source}: its sampler draws another image in a second run, so no timestep can be "
                'weighed; let it draw from torch\'s generator, or set timestep_weights = "uniform" in [method]'
            )
        if place not in self._window:
            return self._filled(found, changed, inputs, self._plain)
        flat = sample.reshape(len(sample), -1)
        changed |= (flat == flat[self._image % len(flat)]).all(1).cpu()
        prediction = self._filled(found, changed, inputs, self._coarse)
        if self.power is None:
            recorded = torch.stack([known for known in found if known is not None])
            self.power = float((prediction - recorded)[changed].double().square().mean())
        return prediction

    def _filled(self, found: Sequence[Tensor | None], changed: Tensor, inputs: Inputs, denoise: Denoise) -> Tensor:
        """What was found, and new predictions for the rows that changed."""
        if not changed.any():
            return torch.stack([known for known in found if known is not None])
        given = {name: value if value.ndim == 0 else value[changed] for name, value in inputs.items()}
        sample, timestep = given.pop(self._denoiser.sample), given.pop(self._denoiser.timestep)
        made = iter(denoise(sample, timestep, **given))
        return torch.stack(
            [next(made) if known is None or new else known for known, new in zip(found, changed, strict=True)]
        )


def _digest(inputs: Inputs, row: int) -> bytes:
    values = (value if value.ndim == 0 else value[row] for value in inputs.values())
    return hashlib.sha256(b"".join(value.cpu().contiguous().numpy().tobytes() for value in values)).digest()
