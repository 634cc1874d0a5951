"""A host that only runs bundles has no torch: commands that need it say so, in one line."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from read_imports import ROOT
from standins.commands import run
from standins.reported_bundle import reported_bundle
from standins.small_bundle import small_bundle

from tfmq_export import load
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.cli.console import COMPILING, EXTRAS
from tfmq_export.progress import Silent
from tfmq_export.proof.draw import Request, draw
from tfmq_export.report.stored import Stored
from tfmq_export.report.verdict import tiles_of, verdict_of
from tfmq_export.runtime.draw import drawn, stored_prompts
from tfmq_export.runtime.measure.compare import as_pictures
from tfmq_export.runtime.sampler import schedule_of

HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from tfmq_export.cli import app_of
app_of({command!r})({arguments!r})
"""


def on_a_host(
    command: str, *arguments: object, there: frozenset[str] | set[str] = frozenset()
) -> "subprocess.CompletedProcess[str]":
    """Run a command where what ``[compile]`` installs is not there, but for some of it."""
    code = HIDDEN.format(packages=set(COMPILING - there), command=command, arguments=[str(each) for each in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("export", ("model.pt",)), ("pack", ("folder", "-o", "model.pt"))],
)
def test_a_command_that_needs_torch_says_how_to_get_it(command: str, arguments: tuple[str, ...]) -> None:
    done = on_a_host(command, *arguments)

    assert done.returncode == 2
    assert "which only '[compile]' installs; pip install 'tfmq-export[compile]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_repository_of_a_server_takes_an_extra_of_its_own(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")

    bare = on_a_host("triton", bundle.root, "-o", tmp_path / "models")
    with_onnx = on_a_host("triton", bundle.root, "-o", tmp_path / "models", there={"onnx", "ml_dtypes"})

    assert bare.returncode == 2
    assert "this command needs onnx, which only '[serve]' installs; pip install 'tfmq-export[serve]'" in bare.stderr
    assert with_onnx.returncode == 0, with_onnx.stderr
    assert (tmp_path / "models/out/1/model.onnx").is_file()


def test_what_serves_needs_none_of_it(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")

    golden = on_a_host("golden", bundle.root, "-o", tmp_path / "golden.json")

    assert golden.returncode == 0, golden.stderr
    assert (tmp_path / "golden.json").exists()


def test_a_bundle_is_timed_without_any_of_it_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")

    done = on_a_host("bench", bundle.root, "--rounds", "2", "-q", "--json", tmp_path / "bench.json")

    assert done.returncode == 0, done.stderr
    assert "not run: twin of w8a8 ort-cpu: it is made with onnx" in done.stdout
    assert "pip install 'tfmq-export[bench]'" in done.stdout
    (setting,) = json.loads((tmp_path / "bench.json").read_text())["settings"]
    assert setting["rounds"] == 2
    assert list(setting["candidates"]) == ["w8a8 ort-cpu"]


def test_its_float_twin_takes_an_extra_without_torch(tmp_path: Path) -> None:
    bundle, there = small_bundle(tmp_path / "out"), EXTRAS["bench"]

    done = on_a_host("bench", bundle.root, "--rounds", "2", "-q", "--plot", tmp_path / "bars.svg", there=there)

    assert done.returncode == 0, done.stderr
    assert "speed 1 is twin of w8a8 ort-cpu" in done.stdout
    assert "not run" not in done.stdout
    assert (tmp_path / "bars.svg").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--against", "model.pt"), "--against model.pt: the float model runs in torch, which is not installed ("),
        (("--plot", "bars.png"), "this command needs matplotlib, which only '[bench]' installs"),
    ],
)
def test_what_was_asked_of_bench_by_name_is_refused_and_not_left_out(
    options: tuple[str, str], said: str, tmp_path: Path
) -> None:
    done = on_a_host("bench", small_bundle(tmp_path / "out").root, "--rounds", "1", "-q", *options)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_figures_of_a_report_are_shown_where_no_page_can_be_drawn(tmp_path: Path) -> None:
    root = reported_bundle(tmp_path / "toy").root

    bare = on_a_host("report", root)
    named = on_a_host("report", root, "-o", tmp_path / "page.html")
    drawn = on_a_host("report", root, "-o", tmp_path / "page.html", there=EXTRAS["report"])

    assert bare.returncode == 0, bare.stderr
    (tile, *_) = tiles_of(Stored.read(root))
    assert f"{tile.value} {tile.unit}" in bare.stdout
    assert verdict_of(Stored.read(root)).text in bare.stdout
    assert "no page written: it needs" in bare.stdout
    assert "pip install 'tfmq-export[report]'" in bare.stdout
    assert named.returncode == 2  # a page asked for by name is not left out
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "page.html").is_file()


SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


@pytest.fixture
def drawing(tmp_path: Path) -> Bundle:
    """A bundle with a scheduler that DDIM walks in numpy."""
    bundle = small_bundle(tmp_path / "out")
    bundle.scheduler.parent.mkdir()
    bundle.scheduler.write_text(json.dumps(SCHEDULER))
    return bundle


def test_images_are_drawn_without_any_of_it(drawing: Bundle, tmp_path: Path) -> None:
    alone = on_a_host("sample", drawing.root, "-o", tmp_path / "alone.png", "--images", "3", "--seed", "5", "-q")
    here = run("sample", drawing.root, "-o", tmp_path / "here.png", "--images", "3", "--seed", "5", "-q")

    assert alone.returncode == 0, alone.stderr
    assert here.exit_code == 0, here.output
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_they_are_those_that_diffusers_draws(drawing: Bundle) -> None:
    seen = draw(drawing, Request(2, seed=3, threads=1), Silent())
    noise = np.random.default_rng(3).standard_normal((2, 3, 8, 8), np.float32)
    schedule = schedule_of(drawing)
    assert schedule is not None

    with load(drawing.root) as loaded:
        found = as_pictures(drawn(loaded, noise, schedule, stored_prompts(drawing, 2)))

    np.testing.assert_allclose(found, seen, atol=1e-5)
    assert found.std() > 0.1


@pytest.mark.parametrize("option", [("--scheduler", "plms"), ("--steps", "2"), ("--image", "start.png")])
def test_what_diffusers_draws_alone_says_what_it_needs(drawing: Bundle, option: tuple[str, str]) -> None:
    done = on_a_host("sample", drawing.root, "-o", drawing.root.parent / "grid.png", *option)

    assert done.returncode == 2
    assert "this command needs torch, which only '[compile]' installs" in done.stderr


def test_the_lists_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    names, carried = {"PIL": "pillow", "yaml": "pyyaml"}, {"ml_dtypes"}  # which onnx brings

    assert {names.get(each, each).replace("_", "-") for each in COMPILING} <= _packages(extras["compile"])
    for extra, packages in EXTRAS.items():
        assert {names.get(each, each).replace("_", "-") for each in packages - carried} == _packages(extras[extra])


def _packages(requirements: list[str]) -> set[str]:
    return {requirement.partition(">=")[0] for requirement in requirements}
