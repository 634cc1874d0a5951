"""A production host has numpy and one engine: nothing else may be needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
ENGINES = ["onnxruntime", "openvino", "tensorrt"]

SAMPLE = """
import sys
import numpy as np
import tfmq_export, tfmq_export.runtime
assert not {"onnxruntime", "openvino", "tensorrt"} & set(sys.modules)
from tfmq_export.runtime import sampler
from tfmq_export.runtime.engines import realized
from tfmq_export.runtime.measure import benchmark, compare

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


NO_OPENVINO = """
import logging, sys
import numpy as np
from tfmq_export.errors import DependencyError
from tfmq_export.runtime import load
logging.basicConfig(stream=sys.stdout, format="%(message)s")
with load(sys.argv[1]) as denoise:
    assert denoise(np.ones((1, 3, 8, 8), np.float32), 500).shape == (1, 3, 8, 8)
try:
    load(sys.argv[1], backend="openvino")
except DependencyError as error:
    assert "pip install openvino" in str(error)
else:
    raise AssertionError("loaded without the engine that was asked for")
"""


def run(blocked: list[str], code: str, bundle: Path, prints: str = "") -> None:
    script = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    done = subprocess.run([sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert prints in done.stdout
    assert bool(prints) == bool(done.stdout)


def test_sampling_needs_numpy_and_an_engine_only(tiny_bundle: Callable[..., Path]) -> None:
    run([*HEAVY, "openvino", "tensorrt"], SAMPLE, tiny_bundle())


def test_with_openvino_nothing_else_is_needed(tiny_bundle: Callable[..., Path]) -> None:
    pytest.importorskip("openvino")

    run([*HEAVY, "onnxruntime", "tensorrt"], SAMPLE, tiny_bundle(target="openvino"))


def test_without_openvino_its_bundles_run_on_onnxruntime_and_say_so(tiny_bundle: Callable[..., Path]) -> None:
    run([*HEAVY, "openvino"], NO_OPENVINO, tiny_bundle(target="openvino"), prints="which is not installed")


def test_the_runtime_imports_without_an_engine_and_asks_for_one(tiny_bundle: Callable[..., Path]) -> None:
    run([*HEAVY, *ENGINES], NO_ENGINE, tiny_bundle())
