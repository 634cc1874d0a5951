"""The tools that measure what the parts are worth: their metrics, and one row from end to end."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import ablate
import draw_images
import numpy as np
import pytest
import sensitivity
from ablation_metrics import frechet_distance, inception_score, kernel_distance
from nets.tiny_model import tiny_folder

from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.models.load import Source

NO_GATE = Thresholds(psnr=-1e3, sqnr=-1e3, agreement=-1e3)  # random weights


def gaussian(rows: int, seed: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((rows, 8))


def test_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    x = gaussian(400, 0)

    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
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


OPTIONS = ("--images", "3", "--steps", "4")


@dataclass(frozen=True)
class Row:
    """A finished row: the folder of its recipe, and what it says of the images."""

    model: Path
    kept: Path
    psnr: list[float]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    root = tmp_path_factory.mktemp("row")
    model, out = tiny_folder(root / "unet"), root / "rows"
    arguments = ["ablate.py", str(model), *OPTIONS, "--keep", "--output", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--row", "w8a8", "fast", "subsets", "all", "0"])
        ablate.main()
    (kept,) = (path for path in out.iterdir() if path.is_dir())
    return Row(model, kept, json.loads(kept.with_suffix(".json").read_text("utf-8"))["psnr"])


def test_a_row_leaves_a_recipe_that_draws_the_images_it_was_judged_on(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["draw_images.py", str(row.model), str(row.kept), *OPTIONS, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    draw_images.main()

    ours, plain = (np.load(tmp_path / f"{name}.npz")["images"] for name in (row.kept.name, "full-precision"))
    assert ours.shape == plain.shape == (3, *ours.shape[1:])
    errors = np.square((ours.astype(float) - plain) / 255).mean((1, 2, 3))
    np.testing.assert_allclose(-10 * np.log10(errors), row.psnr, atol=0.3)  # bytes here, floats there


def test_all_parts_of_a_recipe_cost_what_its_row_says_and_each_alone_less(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    arguments = ["sensitivity.py", str(row.model), "--recipe", str(row.kept), *OPTIONS, "--timesteps", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(table)])
    sensitivity.main()

    found = json.loads(table.read_text("utf-8"))
    means = {part: mean for part, (mean, _, _) in found["parts"].items()}
    assert means["all"] == pytest.approx(np.mean(row.psnr), abs=0.5)  # its temporal tables are computed here
    assert min(means, key=lambda part: means[part]) in ("all", "all but first and last layer", "all but weights")
    assert {entry["part"] for entry in found["layers"]} == {"weight", "input", "output"}
    costs = [sum(10 ** (-value / 10) for value in entry["sqnr"]) for entry in found["layers"]]
    assert costs == sorted(costs, reverse=True)


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
