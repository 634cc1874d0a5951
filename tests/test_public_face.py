"""What ``import tfmq_export`` offers, and the command behind ``python -m``."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from read_imports import ROOT

import tfmq_export

NAMES = sorted(set(tfmq_export.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(tfmq_export, name)

    assert callable(found)
    assert found.__doc__


def test_every_public_name_is_in_the_api_reference() -> None:
    listed = (ROOT.parent / "docs" / "api.md").read_text("utf-8").splitlines()

    assert not [name for name in NAMES if f"::: tfmq_export.{name}" not in listed]


def test_the_public_names_show_in_dir_and_others_are_refused() -> None:
    assert set(tfmq_export.__all__) <= set(dir(tfmq_export))
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        tfmq_export.complie  # noqa: B018  # the look-up is the point


def test_types_and_names_come_from_the_same_modules() -> None:
    body = ast.parse((ROOT / "__init__.py").read_text("utf-8")).body
    (guarded,) = (node for node in body if isinstance(node, ast.If))
    typed = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            typed[alias.asname or alias.name] = getattr(importlib.import_module(node.module or ""), alias.name)

    assert typed == {name: getattr(tfmq_export, name) for name in NAMES}


def test_no_module_hides_a_public_name() -> None:
    modules = {path.stem for path in ROOT.iterdir()}

    assert not modules & set(NAMES)


def test_loading_needs_neither_torch_nor_onnx() -> None:
    code = "import sys; from tfmq_export import load, open_bundle; print({'torch', 'onnx'} & {*sys.modules})"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_package_runs_as_the_command(flag: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tfmq_export", flag], capture_output=True, text=True, check=True)

    assert "python -m tfmq_export" in done.stdout
    assert "--preset" in done.stdout


@pytest.mark.slow  # mypy reads the package
def test_the_readmes_snippet_is_typed(tmp_path: Path) -> None:
    text = (ROOT.parent / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "snippet.py").write_text(
        f"import numpy as np\n\nsample = np.zeros((1, 3, 32, 32), np.float32)\n{snippet}\nreveal_type(prediction)\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "snippet.py")],
        cwd=ROOT.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout
    assert 'Revealed type is "numpy.ndarray[' in done.stdout
