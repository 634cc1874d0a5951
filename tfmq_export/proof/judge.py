"""What was measured against what is demanded; and demands that a model has nothing to be measured with."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.config import Thresholds
from tfmq_export.proof.guidance import require_guidance
from tfmq_export.proof.lpips import require_lpips
from tfmq_export.proof.systematic import CHANNEL, LAYER
from tfmq_export.runtime.measure.compare import Comparison, Direction, Metric, Report, Threshold
from tfmq_export.target import find_target

if TYPE_CHECKING:
    from tfmq_export.proof.validate import Subject

CLOSER = 3.0  # dB that kernels must be closer to their graph than the graph is to full precision

AS_CLOSE = 1.0
"""dB that images as served may be farther from full precision than the graph's own, to be held to no more than that.

Where rounding alone moves images by as much as quantization does (a tiny model with guidance of 7.5), right kernels
give images as far from the graph's as both are from full precision: two errors of one size are 3 dB apart. Those of
wrong kernels are farther from full precision.
"""


def require_measurable(denoiser: Denoiser, thresholds: Thresholds) -> None:
    """Refuse bounds on what cannot be measured on a model, as far as it tells before it draws.

    Raises:
        ConfigError: it has no guidance, or draws no images for LPIPS.
        DependencyError: LPIPS' weights are not installed.
    """
    require_guidance(denoiser, thresholds)
    require_lpips(denoiser, thresholds)


def judge(found: Mapping[Metric, Comparison], subject: "Subject", thresholds: Thresholds) -> Report:
    """What was measured against what is demanded; the floors are the preset's where nothing else was said."""
    preset, tib = subject.recipe.preset, subject.carried_out.tib
    asked = [
        (Metric.FINITE, 1.0, found[Metric.FINITE].lowest),
        (Metric.IMAGE_PSNR, thresholds.psnr_of(preset), found[Metric.IMAGE_PSNR].mean),
        (Metric.SQNR, thresholds.sqnr_of(preset), found[Metric.STEP_SQNR].mean),
        (Metric.KERNELS, thresholds.kernels, found[Metric.KERNELS].median),
        (Metric.KERNELS_AT_ENDS, thresholds.kernels, found[Metric.KERNELS_AT_ENDS].median),
        (Metric.SERVED_IMAGES, _closeness(found, thresholds), found[Metric.SERVED_IMAGES].median),
        (
            Metric.FEATURE_COSINE,
            thresholds.temporal_cosine_of(tib.source, tib.stored),
            found[Metric.FEATURE_COSINE].lowest,
        ),
        (Metric.TABLE_EXACTNESS, 1.0, found[Metric.TABLE_EXACTNESS].lowest),
        (Metric.LOCK_STEP, thresholds.agreement, found[Metric.LOCK_STEP].lowest),
    ]
    if Metric.IMAGE_SSIM in found:
        asked.insert(2, (Metric.IMAGE_SSIM, thresholds.ssim, found[Metric.IMAGE_SSIM].mean))
    if thresholds.guidance is not None:
        asked.append((Metric.GUIDANCE, thresholds.guidance, found[Metric.GUIDANCE].mean))
    verdicts = [Threshold(metric, least).judge(value) for metric, least, value in asked]
    target = find_target(subject.bundle.manifest.target)
    if target.float_type == "float32" and not target.integers_only:  # in 16 bits everything differs
        for metric, share in ((Metric.CHANNEL_EXCESS, CHANNEL), (Metric.LAYER_SHARE, LAYER)):
            verdicts.append(Threshold(metric, share, Direction.AT_MOST).judge(found[metric].highest))
    if thresholds.lpips is not None:
        most = Threshold(Metric.IMAGE_LPIPS, thresholds.lpips, Direction.AT_MOST)
        verdicts.append(most.judge(found[Metric.IMAGE_LPIPS].mean))
    return Report(tuple(found[metric] for metric in Metric if metric in found), tuple(verdicts))


def _closeness(found: Mapping[Metric, Comparison], thresholds: Thresholds) -> float:
    """How close images as served must be to the graph's, dB."""
    graph, served = found[Metric.GRAPH_IMAGES], found[Metric.IMAGE_PSNR].values
    same = served[: len(graph.values)]  # the graph draws the first of the images alone
    lost = graph.mean - fmean(same)
    drift = -CLOSER - AS_CLOSE if lost <= AS_CLOSE else CLOSER
    return min(thresholds.kernels, graph.median + drift)
