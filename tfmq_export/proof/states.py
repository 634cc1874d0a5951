"""What the sampler held on the way from noise to images, for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.bundle.pictures import is_picture
from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.runtime.measure.compare import as_pictures

KEPT = 10  # of a walk, evenly


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Pictures in 0..1.

    Attributes:
        reference: What the full-precision model was given, [F, N, C, H, W].
        compiled: What the compiled graph was given, which drew its own images from the same noise.
        calls: At which call of the walk each is, counted from 0, [F].
    """

    reference: NDArray[np.float32]
    compiled: NDArray[np.float32]
    calls: NDArray[np.int64]


def states_of(
    reference: Sequence[CalibrationStep], compiled: Sequence[CalibrationStep], sample: str, images: Tensor
) -> States | None:
    """Some of the samples that two recorded walks passed through.

    None where they are no pictures like the images that came out, or where a call does not tell whose image is whose.

    Args:
        sample: Name of the sample input.
        images: That came out, [N, ...].
    """
    given = reference[0].inputs[sample]
    alike = is_picture(given.shape) and given.shape[1:] == images.shape[1:] and len(reference) == len(compiled)
    if not alike or not _in_order(given, len(images)):
        return None
    calls = np.unique(np.linspace(0, len(reference) - 1, KEPT).astype(np.int64))
    pictures = [
        as_pictures(torch.stack([walk[call].inputs[sample][: len(images)] for call in calls]).numpy())
        for walk in (reference, compiled)
    ]
    return States(pictures[0], pictures[1], calls)


def _in_order(rows: Tensor, images: int) -> bool:
    """Whether the first rows of a call are the images in turn; with guidance, both halves begin with the same noise."""
    if len(rows) % images:
        return False
    return bool((rows.reshape(-1, images, *rows.shape[1:]) == rows[:images]).all())
