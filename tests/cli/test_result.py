"""What was drawn is called what it is."""

import numpy as np
import pytest

from tfmq_export.cli.result import drawn_row
from tfmq_export.runtime.measure.compare import Comparison, Metric, Report


def report(psnr: float) -> Report:
    values = {Metric.IMAGE_PSNR: psnr, Metric.OTHER_PICTURES: 9.0}
    return Report(tuple(Comparison.of(metric, np.full(2, value)) for metric, value in values.items()), ())


@pytest.mark.parametrize(
    ("shape", "what"),
    [((2, 3, 8, 8), "images"), ((2, 1, 8, 8), "images"), ((2, 4, 8, 8), "latents"), ((2, 16), "samples")],
)
def test_latents_are_called_latents(shape: tuple[int, ...], what: str) -> None:
    assert drawn_row(report(30.0), shape) == (what, f"PSNR 30.0 dB (worst 30.0), 2 {what}")
    assert f"POOR: not the same {what} any more (two different ones have 9.0 dB)" in drawn_row(report(12.0), shape)[1]
