"""What was measured against what is demanded."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tfmq_export.config import Thresholds
from tfmq_export.errors import AccuracyError
from tfmq_export.proof.judge import judge
from tfmq_export.proof.validate import Subject
from tfmq_export.runtime.measure.compare import Comparison, Metric

TIB = SimpleNamespace(source="table", stored="fp32")


def subject(target: str = "ort-cpu") -> Subject:
    found = SimpleNamespace(
        recipe=SimpleNamespace(preset="w8a8"),
        carried_out=SimpleNamespace(tib=TIB),
        bundle=SimpleNamespace(manifest=SimpleNamespace(target=target)),
    )
    return cast("Subject", found)


GOOD = dict.fromkeys(Metric, 60.0) | {
    Metric.FINITE: 1.0,
    Metric.IMAGE_SSIM: 1.0,
    Metric.FEATURE_COSINE: 1.0,
    Metric.TABLE_EXACTNESS: 1.0,
    Metric.CHANNEL_EXCESS: 0.003,
    Metric.LAYER_SHARE: 0.0003,
}


def report_of(thresholds: Thresholds | None = None, target: str = "ort-cpu", **changes: float) -> Any:
    values = GOOD | {Metric[name]: value for name, value in changes.items()}
    found = {metric: Comparison(metric, (value,)) for metric, value in values.items()}
    return judge(found, subject(target), thresholds or Thresholds())


def test_what_meets_every_bound_passes() -> None:
    report_of().raise_if_failed()


@pytest.mark.parametrize(
    ("metric", "value", "named"),
    [
        ("FINITE", 0.999, "finite share of the images"),
        ("IMAGE_PSNR", 17.9, "image PSNR"),
        ("IMAGE_PSNR", math.nan, "image PSNR"),
        ("STEP_SQNR", 19.0, "noise-prediction SQNR"),
        ("KERNELS", 17.0, "integer kernels against the graph"),
        ("KERNELS_AT_ENDS", 17.0, "integer kernels at the ends"),
        ("SERVED_IMAGES", 24.0, "images as served"),
        ("FEATURE_COSINE", 0.99, "temporal feature cosine"),
        ("TABLE_EXACTNESS", 0.9, "temporal table exactness"),
        ("LOCK_STEP", 39.0, "lock-step"),
        ("CHANNEL_EXCESS", 0.06, "share of a channel that differs"),
        ("LAYER_SHARE", 0.51, "share of a layer that differs"),
    ],
)
def test_each_bound_is_held_alone(metric: str, value: float, named: str) -> None:
    report = report_of(**{metric: value})

    assert len(report.failed) == 1
    with pytest.raises(AccuracyError, match=named):
        report.raise_if_failed()


def test_images_as_served_may_be_as_far_from_the_graph_as_both_are_from_full_precision() -> None:
    """Rounding moves the images of a tiny model with guidance as much as quantization does."""
    chaotic = {"IMAGE_PSNR": 26.0, "GRAPH_IMAGES": 26.5}

    assert report_of(**chaotic, SERVED_IMAGES=23.0).passed
    assert not report_of(**chaotic, SERVED_IMAGES=22.0).passed
    wrong = {"IMAGE_PSNR": 22.0, "GRAPH_IMAGES": 26.5}  # served images that have lost more than the graph's
    assert not report_of(**wrong, SERVED_IMAGES=24.0).passed


def test_graphs_in_half_precision_differ_everywhere_and_pass() -> None:
    report_of(target="tensorrt", CHANNEL_EXCESS=0.4, LAYER_SHARE=0.9).raise_if_failed()


def test_infinite_images_fail_whatever_their_distance() -> None:
    # Two equal infinities are infinitely near to each other.
    report = report_of(FINITE=0.0, IMAGE_PSNR=math.inf)

    assert [verdict.metric for verdict in report.failed] == [Metric.FINITE]


@pytest.mark.parametrize(
    ("metric", "good", "bad", "said"),
    [
        ("GUIDANCE", 0.96, 0.89, "guidance kept 0.89, asked >= 0.9"),
        ("GUIDANCE", 1.2, math.nan, "guidance kept nan, asked >= 0.9"),
        ("IMAGE_LPIPS", 0.02, 0.06, "image ST-LPIPS 0.06, asked <= 0.05"),
        ("IMAGE_LPIPS", 0.0, math.nan, "image ST-LPIPS nan, asked <= 0.05"),
    ],
)
def test_bounds_that_no_preset_has_hold_where_they_are_asked_for(
    metric: str, good: float, bad: float, said: str
) -> None:
    asked = Thresholds(guidance=0.9, lpips=0.05)
    fine = {"GUIDANCE": 1.0, "IMAGE_LPIPS": 0.0}

    assert report_of(asked, **{**fine, metric: good}).passed
    assert report_of(**{**fine, metric: bad}).passed  # not asked for
    assert [each.describe() for each in report_of(asked, **{**fine, metric: bad}).failed] == [said]
