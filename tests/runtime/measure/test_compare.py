import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from tfmq_export.errors import AccuracyError, ConfigError
from tfmq_export.runtime.measure.compare import (
    Comparison,
    Direction,
    Metric,
    Report,
    Threshold,
    as_pictures,
    cosine,
    psnr,
    sqnr_db,
    ssim,
)

IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 2, 16, 20)).astype(np.float32)


def test_a_samplers_result_becomes_pictures_in_zero_to_one() -> None:
    found = as_pictures(np.array([-1.5, -1.0, 0.0, 0.5, 1.0, 3.0]))

    assert found.dtype == np.float32
    assert found.tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_psnr_of_a_constant_error_is_its_formula() -> None:
    np.testing.assert_allclose(psnr(IMAGES, IMAGES + 0.1, 1.0), 20.0, rtol=1e-5)


def test_psnr_is_per_image_and_infinite_where_equal() -> None:
    other = IMAGES.copy()
    other[1] += 0.01

    values = psnr(IMAGES, other, 1.0)

    assert values.shape == (3,)
    assert np.isinf(values[[0, 2]]).all()
    np.testing.assert_allclose(values[1], 40.0, rtol=1e-4)


def test_psnr_of_bytes_does_not_wrap_around() -> None:
    black, white = np.zeros((1, 1, 4, 4), np.uint8), np.full((1, 1, 4, 4), 255, np.uint8)

    np.testing.assert_allclose(psnr(black, white, 255), 0.0, atol=1e-12)


def test_ssim_of_equal_images_is_one() -> None:
    np.testing.assert_allclose(ssim(IMAGES, IMAGES, 1.0), np.ones(3), rtol=1e-12)


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    dark, bright = np.full((1, 1, 12, 12), 0.2), np.full((1, 1, 12, 12), 0.6)
    c1 = 0.01**2

    np.testing.assert_allclose(ssim(dark, bright, 1.0), (2 * 0.12 + c1) / (0.04 + 0.36 + c1), rtol=1e-9)


def test_ssim_of_one_window_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, 1, (2, 11, 11))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    vxy = (weights * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))

    np.testing.assert_allclose(ssim(x[None, None], y[None, None], 1.0), expected, rtol=1e-9)


def test_ssim_is_symmetric_falls_with_noise_and_scales_with_the_peak() -> None:
    noise = np.random.default_rng(2).standard_normal(IMAGES.shape)
    little, much = IMAGES + 0.02 * noise, IMAGES + 0.2 * noise

    assert (ssim(IMAGES, much, 1.0) < ssim(IMAGES, little, 1.0)).all()
    np.testing.assert_allclose(ssim(IMAGES, much, 1.0), ssim(much, IMAGES, 1.0), rtol=1e-12)
    np.testing.assert_allclose(ssim(IMAGES, much, 1.0), ssim(255.0 * IMAGES, 255 * much, 255.0), rtol=1e-6)


def test_ssim_of_images_smaller_than_its_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 11 pixels"):
        ssim(IMAGES[..., :10, :], IMAGES[..., :10, :], 1.0)


def test_sqnr_is_the_ratio_of_energies() -> None:
    x = np.asarray([3.0, 4.0])

    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x * 1.1) == pytest.approx(20.0)
    assert sqnr_db(np.zeros(2), x) == -math.inf


def test_cosine_is_along_the_last_axis() -> None:
    a = np.asarray([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.asarray([[0.0, 2.0], [-3.0, -3.0], [0.0, 0.0], [1.0, 0.0]])

    np.testing.assert_allclose(cosine(a, b), [0, -1, 1, 0], atol=1e-12)


@pytest.mark.parametrize("metric", [lambda a, b: psnr(a, b, 1.0), lambda a, b: ssim(a, b, 1.0), sqnr_db, cosine])
def test_shapes_must_agree(metric: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="cannot compare shapes"):
        metric(IMAGES, IMAGES[:1])


def test_a_threshold_holds_in_its_direction_and_nan_passes_none() -> None:
    at_least, at_most = Threshold("psnr", 30.0), Threshold("latency", 2.0, Direction.AT_MOST)

    assert at_least.judge(30.0).passed
    assert at_least.judge(math.inf).passed
    assert not at_least.judge(29.9).passed
    assert at_most.judge(1.9).passed
    assert not at_most.judge(2.1).passed
    assert not at_least.judge(math.nan).passed
    assert not at_most.judge(math.nan).passed


def test_a_report_is_strict_json_whatever_was_measured() -> None:
    comparison = Comparison.of("psnr", np.asarray([math.inf, 31.5, math.nan]))
    report = Report((comparison,), (Threshold("psnr", 30.0).judge(math.inf), Threshold("ssim", 0.9).judge(0.5)))

    data = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert data["passed"] is False
    assert data["comparisons"][0]["values"] == ["inf", 31.5, "nan"]
    assert [verdict["passed"] for verdict in data["verdicts"]] == [True, False]


def test_a_failed_report_names_what_was_missed() -> None:
    report = Report((), (Threshold("psnr", 30.0).judge(35.0), Threshold("ssim", 0.9).judge(0.5)))

    with pytest.raises(AccuracyError, match=r"^ssim 0\.5, asked >= 0\.9; "):
        report.raise_if_failed()
    Report((), report.verdicts[:1]).raise_if_failed()


def test_it_says_which_options_would_let_it_through() -> None:
    psnr, lpips = Threshold(Metric.IMAGE_PSNR, 18), Threshold(Metric.IMAGE_LPIPS, 0.1, Direction.AT_MOST)
    missed = psnr.judge(14.876), lpips.judge(0.2312)

    with pytest.raises(AccuracyError, match=r", or ask for less: --min-psnr 14\.87 --max-lpips 0\.24$"):
        Report((), missed).raise_if_failed()
    with pytest.raises(AccuracyError, match=r", or ask for less$"):  # no number lets NaN through
        Report((), (psnr.judge(float("nan")),)).raise_if_failed()
    assert Threshold(psnr.metric, 14.87).judge(14.876).passed
