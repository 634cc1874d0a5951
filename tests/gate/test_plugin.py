"""Gates as a team runs them: pytest in a process of its own, with what a production host has."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from standins.small_bundle import small_bundle

from tfmq_export.gate import make_golden, write_golden

ROOT = Path(__file__).parents[2]
PLUGIN = "tfmq_export.gate.plugin"
HEAVY = ["torch", "diffusers", "onnx", "onnx_graphsurgeon", "onnxscript", "safetensors", "pydantic", "typer", "rich"]
PRODUCTION = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def gate(path: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run a gate where numpy, onnxruntime and pytest are all there is."""
    words = ["-p", "no:cacheprovider", f"--rootdir={path.parent}", "-p", PLUGIN, "-v", path, *options]
    command = [sys.executable, "-c", PRODUCTION, *map(str, words)]
    # Installed or not, the plugin is loaded once; and none of a developer's others.
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent, env=env)


def test_every_check_is_a_test_that_needs_no_torch_and_no_onnx(gate_file: Callable[..., Path], tmp_path: Path) -> None:
    done = gate(gate_file("sqnr = 30", "integer_share = 0.8"), f"--junit-xml={tmp_path / 'junit.xml'}")

    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("files", "host", "receipt", "predictions", "images"):
        assert f"tiny.gate.toml::{name} PASSED (" in done.stdout
    assert "receipt PASSED (45 of 45 layers in integers, 88.7% of the MACs)" in done.stdout
    said = {item.get("name"): item.get("value") for item in ElementTree.parse(tmp_path / "junit.xml").iter("property")}
    assert "45 of 45 layers in integers" in said["tfmq receipt"]


def test_a_failure_is_the_report_and_nothing_else(gate_file: Callable[..., Path], altered: Any) -> None:
    root = altered(0.25, rehashed=True)

    done = gate(gate_file("sqnr = 30\npsnr = 60"), "--tfmq-bundle", root)

    assert done.returncode == 1
    assert "3 failed, 2 passed" in done.stdout
    assert str(root) in done.stdout
    assert re.search(r"  timestep 666: SQNR [-\d.]+ dB, asked >= 30", done.stdout)
    assert "next: compare with the float model" in done.stdout
    assert "checks.py" not in done.stdout
    summary = done.stdout.partition("short test summary info")[2]
    assert re.search(r"FAILED tiny.gate.toml::predictions - timestep \d+: SQNR [-\d.]+ dB", summary)


def test_what_cannot_be_checked_for_one_cause_fails_once(gate_file: Callable[..., Path], tmp_path: Path) -> None:
    done = gate(gate_file(), "--tfmq-bundle", tmp_path / "none")

    assert done.returncode == 1
    assert "1 failed, 4 skipped" in done.stdout
    assert f"FAILED tiny.gate.toml::files - {tmp_path}"[:50] in done.stdout


def test_images_that_cannot_be_compared_are_skipped_not_passed(gate_file: Callable[..., Path], tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")  # brings no scheduler
    write_golden(make_golden(bundle), tmp_path / "small.golden.json")

    done = gate(gate_file(f'file = "{tmp_path / "small.golden.json"}"', bundle=bundle.root))

    assert "tiny.gate.toml::images SKIPPED" in done.stdout
    assert "3 passed, 2 skipped" in done.stdout


def test_a_float_model_without_torch_says_what_is_missing(gate_file: Callable[..., Path]) -> None:
    done = gate(gate_file(None, model=""))

    assert done.returncode == 1
    assert re.search(r"\[model\] needs \w+, which is not installed", done.stdout)


def test_a_broken_gate_is_one_line(gate_file: Callable[..., Path]) -> None:
    done = gate(gate_file("sqrn = 30"))

    assert done.returncode == 2
    assert "unknown setting golden.sqrn; did you mean golden.sqnr?" in done.stdout
    assert "Traceback" not in done.stdout


def test_pytest_finds_the_plugin_by_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

    assert project["project"]["entry-points"]["pytest11"] == {"tfmq_export": PLUGIN}
    assert {"tfmq_export.gate", "tfmq_export.serving"} <= set(project["tool"]["setuptools"]["packages"])


BLOCK = r"<!-- {} -->\n+```\w+\n(.*?)```"


def documented(mark: str) -> str:
    """A block of docs/validation.md."""
    found = re.search(BLOCK.format(mark), (ROOT / "docs/validation.md").read_text("utf-8"), re.DOTALL)
    assert found is not None, mark
    return found[1]


def test_the_guides_example_runs_as_it_stands(release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emoji32.gate.toml").write_text(documented("gate"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/emoji32-w8a8").symlink_to(release.bundle)
    (tmp_path / "emoji32.golden.json").symlink_to(release.golden)
    monkeypatch.chdir(tmp_path)

    done = gate(tmp_path / "emoji32.gate.toml")
    exec(documented("gate-python"), {})  # raises where a check fails

    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
