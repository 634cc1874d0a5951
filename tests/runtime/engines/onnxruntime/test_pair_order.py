"""Which weights real kernels add in pairs: the law that the pair rule (``tfmq_export/recipe/pairs.py``) stands on.

Input channels 2j and 2j + 1 meet in 16 bits on a CPU without VNNI, 2j + 1 and 2j + 2 never do. On any other CPU no two
weights do. Where this is one of those, a last test runs the others as on a CPU without VNNI.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.realized import realized
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.runtime.measure.machine import adds_in_16_bits
from tfmq_export.target import find_target

ROOT = Path(__file__).parents[4]
DISGUISED = "WITHOUT_VNNI_CPUINFO" in os.environ
"""Whether ``tools/without_vnni.py`` runs this."""

CHANNELS, OUTPUTS = 16, 8
EXACT = 60.0  # dB; floating point in another order leaves over 100, a tie of a rounded output here and there 70
WRONG = 15.0

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
ENGINES = [
    pytest.param("ort-cpu", "onnxruntime", id="onnxruntime"),
    pytest.param("openvino", "openvino", id="openvino", marks=needs_openvino),
]


@dataclass(frozen=True)
class Layer:
    """One layer of ``CHANNELS`` inputs and ``OUTPUTS`` outputs.

    Attributes:
        x: Shape of its input.
        kernel: Of its weight, behind output and input channels.
    """

    op: str
    x: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    attributes: Mapping[str, object] = field(default_factory=dict)

    def weight(self, channels: NDArray[np.int8]) -> NDArray[np.int8]:
        """The same weight for every output, at every position of the kernel; as the node wants it."""
        places = channels.reshape(1, -1, *[1] * len(self.kernel))
        weight = np.broadcast_to(places, (OUTPUTS, CHANNELS, *self.kernel))
        return np.ascontiguousarray(weight.T if self.op == "MatMul" else weight)

    def inputs(self, channels: NDArray[np.int8]) -> NDArray[np.float32]:
        """Large where weights are positive, and small elsewhere: what saturates upwards is not made up for."""
        means = np.where(channels > 0, 0.97, 0.03).reshape(-1, *[1] * len(self.kernel))
        return (means + np.random.default_rng(0).uniform(-0.02, 0.02, self.x)).astype(np.float32)


LAYERS = {
    "conv": Layer("Conv", (2, CHANNELS, 6, 6), (3, 3), {"pads": [1] * 4}),
    "conv of one position": Layer("Conv", (2, CHANNELS, 6, 6), (1, 1)),
    "linear": Layer("MatMul", (2, 12, CHANNELS)),
    "linear of rank 2": Layer("Gemm", (12, CHANNELS), attributes={"transB": 1}),
}


def write(path: Path, layer: Layer, weight: NDArray[np.int8], *, output: bool) -> Path:
    """``x -> Q -> DQ -> layer [-> Q -> DQ]``."""
    constants = {
        "scale": np.float32(1 / 255),
        "zero": np.uint8(3),
        "weight_codes": weight,
        "weight_scale": np.full(OUTPUTS, 1 / 127, np.float32),
        "weight_zero": np.zeros(OUTPUTS, np.int8),
        "output_scale": np.float32(1.0),
        "output_zero": np.uint8(5),
    }
    grid = [f"weight_{part}" for part in ("codes", "scale", "zero")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["real"]),
        helper.make_node("DequantizeLinear", grid, ["weight"], axis=int(layer.op == "MatMul")),
        helper.make_node(layer.op, ["real", "weight"], ["y"], "node_layer", **layer.attributes),
    ]
    if output:
        nodes += [
            helper.make_node("QuantizeLinear", ["y", "output_scale", "output_zero"], ["output_codes"]),
            helper.make_node("DequantizeLinear", ["output_codes", "output_scale", "output_zero"], ["prediction"]),
        ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.x)],
        [helper.make_tensor_value_info("prediction" if output else "y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def in_twos(first: int) -> NDArray[np.int8]:
    """Weights of equal sign in channels ``first`` and ``first + 1``, and so on all around: + + - - + + - -."""
    return np.roll(127 * np.int8([1, 1, -1, -1] * (CHANNELS // 4)), first)


def largest_sum(channels: NDArray[np.int8], first: int) -> int:
    """Of the channels ``first`` and ``first + 1``, and so on all around."""
    return int(np.abs(np.roll(channels, -first).reshape(-1, 2).sum(1, dtype=int)).max())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("target", "engine"), ENGINES)
def test_only_an_even_channel_and_the_next_one_are_added_in_16_bits(
    target: str, engine: str, name: str, tmp_path: Path
) -> None:
    layer, kind = LAYERS[name], name.split()[0]
    found = []
    for first in (0, 1):
        channels = in_twos(first)
        assert (largest_sum(channels, first), largest_sum(channels, 1 - first)) == (254, 0)
        output = kind in find_target(target).quantized_outputs
        path = write(tmp_path / f"{first}.onnx", layer, layer.weight(channels), output=output)
        realized(path, [LayerInfo("layer", "layer", kind, 1, 8, 8)], engine).raise_if_lost()

        feeds = {"x": layer.inputs(channels)}
        with open_runner(path, target, threads=1) as integers, OrtRunner(path, integer=False) as reference:
            (got,), (wanted,) = (runner.infer(feeds).values() for runner in (integers, reference))
        found.append(sqnr_db(wanted, got))

    even, odd = found
    assert odd > EXACT
    assert even < WRONG if adds_in_16_bits() else even > EXACT


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64")
    or not all(map(shutil.which, ("gcc", "objdump")))
    or (adds_in_16_bits() and not DISGUISED),
    reason="needs x86-64 Linux with gcc and objdump, and a CPU with VNNI",
)
def test_the_same_on_a_cpu_without_vnni() -> None:
    if DISGUISED:
        assert adds_in_16_bits()
        return
    again = [ROOT / "tools" / "without_vnni.py", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]

    done = subprocess.run([sys.executable, *map(str, again)], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
