"""A host that only runs bundles has no torch: commands that need it say so, in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from read_imports import ROOT
from standins.small_bundle import small_bundle

from tfmq_export.cli.console import COMPILING

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


def on_a_host(command: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command where what ``[compile]`` installs is not there."""
    code = HIDDEN.format(packages=set(COMPILING), command=command, arguments=[str(each) for each in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("export", ("model.pt",)), ("sample", ("out", "-o", "grid.png")), ("pack", ("folder", "-o", "model.pt"))],
)
def test_a_command_that_needs_torch_says_how_to_get_it(command: str, arguments: tuple[str, ...]) -> None:
    done = on_a_host(command, *arguments)

    assert done.returncode == 2
    assert "which only '[compile]' installs; pip install 'tfmq-export[compile]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_serves_needs_none_of_it(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")

    golden = on_a_host("golden", bundle.root, "-o", tmp_path / "golden.json")

    assert golden.returncode == 0, golden.stderr
    assert (tmp_path / "golden.json").exists()


def test_the_list_is_that_of_the_package() -> None:
    wanted = (ROOT.parent / "pyproject.toml").read_text("utf-8").partition("\ncompile = [")[2].partition("\n]")[0]
    names = {"PIL": "pillow", "yaml": "pyyaml", "ml_dtypes": "ml-dtypes", "onnx_ir": "onnx-ir"}

    for package in COMPILING:
        assert f'"{names.get(package, package).replace("_", "-")}>=' in wanted
