"""The tools that measure what the parts are worth: their metrics, and one row from end to end."""

import json
import sys
from pathlib import Path

import ablate
import draw_images
import numpy as np
import pytest
from ablation_metrics import frechet_distance, inception_score, kernel_distance
from tiny_model import tiny_folder

from tfmq_export.compiler import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.models.load import Source

NO_GATE = Thresholds(psnr=-1e3, sqnr=-1e3, agreement=-1e3)  # random weights


def gaussian(rows: int, seed: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((rows, 8))


def test_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    x = gaussian(4000, 0)

    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(8 * 9)  # the means alone
    assert frechet_distance(x, 2 * x) == pytest.approx(
        np.square(x.mean(0)).sum() + np.trace(np.cov(x.T))  # (2 - 1)^2 of the covariance
    )


def test_kernel_distance_tells_equal_from_shifted_distributions() -> None:
    same = kernel_distance(gaussian(400, 0), gaussian(400, 1))
    shifted = kernel_distance(gaussian(400, 0), gaussian(400, 1, mean=1.0))

    assert abs(same) < 0.1 < shifted


def test_inception_score_counts_the_classes_seen() -> None:
    certain = 100 * np.eye(5)[np.arange(500) % 5]

    assert inception_score(certain) == pytest.approx(5, rel=1e-4)
    assert inception_score(np.zeros((100, 5))) == pytest.approx(1)


def test_a_row_leaves_a_recipe_that_draws_the_images_it_was_judged_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_folder(tmp_path / "unet"), tmp_path / "rows"
    options = ["--images", "3", "--steps", "4"]
    row = ["w8a8", "fast", "subsets", "all", "0"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(model), *options, "--keep", "--output", str(out), "--row", *row])
    ablate.main()
    (kept,) = (path for path in out.iterdir() if path.is_dir())
    judged = json.loads(kept.with_suffix(".json").read_text("utf-8"))

    drawn = tmp_path / "drawn"
    monkeypatch.setattr(sys, "argv", ["draw_images.py", str(model), str(kept), *options, "--output", str(drawn)])
    draw_images.main()

    ours, plain = (np.load(drawn / f"{name}.npz")["images"] for name in (kept.name, "full-precision"))
    assert ours.shape == plain.shape == (3, *ours.shape[1:])
    errors = np.square((ours.astype(float) - plain) / 255).mean((1, 2, 3))
    np.testing.assert_allclose(-10 * np.log10(errors), judged["psnr"], atol=0.3)  # bytes here, floats there


def test_bundles_draw_on_their_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder(tmp_path / "unet")
    config = CompileConfig(effort="fast", calibration_images=2, validation_images=1, thresholds=NO_GATE)
    bundle = compile_model(Source(model, steps=4), tmp_path / "out", config).bundle
    drawn, options = tmp_path / "drawn", ["--images", "3", "--steps", "4"]
    arguments = ["draw_images.py", str(model), str(bundle.root), *options]
    for name, more in (("fake", []), ("run", ["--run"])):
        monkeypatch.setattr(sys, "argv", [*arguments, *more, "--output", str(drawn / name)])
        draw_images.main()

    fake, ran = (np.load(drawn / name / "out.npz")["images"].astype(float) for name in ("fake", "run"))
    plain = np.load(drawn / "run" / "full-precision.npz")["images"].astype(float)
    assert not np.array_equal(ran, plain)
    assert np.square(ran - fake).mean() < np.square(ran - plain).mean()
