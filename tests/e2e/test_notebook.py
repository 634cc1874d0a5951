"""The example notebook runs from its first cell to its last, and shows what it promises."""

import os
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow  # compiles an example twice
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(EXAMPLES / "compile.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]  # it is kept without results

    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(EXAMPLES)}}).execute()

    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert [page for page in pages if "<progress" in page and "Quantizing" in page]
    assert [page for page in pages if "integer" in page.lower() and "<progress" not in page]  # the bundle's own
    assert [output for output in shown if "image/png" in output.get("data", {})]
    said = "".join(output["text"] for output in shown if output["output_type"] == "stream")
    assert re.search(r"^w8a8: 2\.\d+ MB, PSNR \d+", said, re.MULTILINE)
    assert re.search(r"^w4a8: 1\.\d+ MB, PSNR \d+", said, re.MULTILINE)
