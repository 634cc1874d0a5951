"""A production host has numpy and one engine: nothing else may be needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""

HEAVY = ["torch", "diffusers", "onnx", "onnx_graphsurgeon", "onnxscript", "safetensors", "pydantic", "rich"]
HEAVY += ["typer", "matplotlib", "transformers", "scipy"]

SAMPLE = """
import sys
import numpy as np
import tfmq_export, tfmq_export.runtime
assert "onnxruntime" not in sys.modules
from tfmq_export.runtime import benchmark, compare, realized, sampler

with tfmq_export.runtime.load(sys.argv[1], threads=1, verify=True) as denoise:
    schedule = sampler.DdimSchedule.from_config({}, 4)
    images = sampler.sample(denoise, np.ones((1, 3, 8, 8), np.float32), schedule)
assert np.isfinite(images).all()
"""

NO_ENGINE = """
import sys
import tfmq_export.runtime
from tfmq_export.errors import DependencyError
from tfmq_export.runtime import load
try:
    load(sys.argv[1])
except DependencyError as error:
    assert "pip install onnxruntime" in str(error)
else:
    raise AssertionError("loaded without an engine")
"""


def run(blocked: list[str], code: str, bundle: Path) -> None:
    script = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    done = subprocess.run([sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_sampling_needs_numpy_and_an_engine_only(tiny_bundle: Callable[..., Path]) -> None:
    run(HEAVY, SAMPLE, tiny_bundle())


def test_the_runtime_imports_without_an_engine_and_asks_for_one(tiny_bundle: Callable[..., Path]) -> None:
    run([*HEAVY, "onnxruntime"], NO_ENGINE, tiny_bundle())
