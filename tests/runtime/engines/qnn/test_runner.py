import importlib.util
from pathlib import Path

import numpy as np
import pytest
from nets.qdq_graphs import QdqGraph
from nets.qnn_graphs import sigmoid_graph

from tfmq_export.errors import BuildError, ConfigError, LoadError
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.qnn.library import chip_number
from tfmq_export.runtime.engines.qnn.runner import QnnRunner
from tfmq_export.runtime.engines.qnn.session import sizes_of

needs_qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")


@needs_qnn
@pytest.mark.parametrize("batch", [1, 3])
def test_the_emulator_computes_what_the_graph_says(batch: int, tmp_path: Path) -> None:
    path = sigmoid_graph(tmp_path / "model.onnx")
    x = np.random.default_rng(0).uniform(-3, 3, (batch, 4, 8, 8)).astype(np.float32)

    with QnnRunner(path) as runner, OrtRunner(path, integer=False) as reference:
        (got,), (expected,) = (each.infer({"sample": x}).values() for each in (runner, reference))

    assert got.shape == x.shape
    np.testing.assert_allclose(got, expected, atol=6 * 2.0**-16)  # some codes of 16 bits


@needs_qnn
def test_wrong_inputs_are_refused_and_the_runner_goes_on(tmp_path: Path) -> None:
    x = np.zeros((1, 4, 8, 8), np.float32)
    with QnnRunner(sigmoid_graph(tmp_path / "model.onnx")) as runner:
        for wrong, reason in (
            ({}, "got the inputs none"),
            ({"sample": x[0]}, r"sample has shape \[4, 8, 8\]"),
            ({"sample": x.astype(np.float64)}, "sample is float64, needs float32"),
        ):
            with pytest.raises(BuildError, match=reason):
                runner.infer(wrong)
        runner.infer({"sample": x})
    with pytest.raises(ConfigError, match="is closed"):
        runner.infer({"sample": x})


@needs_qnn
def test_a_graph_that_needs_the_cpu_is_refused(tmp_path: Path) -> None:
    graph = QdqGraph("batch", 4, 8, 8)
    x = graph.node("Einsum", [graph.activation("sample")], "turned", "turned", equation="nchw->nhwc")
    graph.save(tmp_path / "model.onnx", x, ["batch", 8, 8, 4])

    with (
        QnnRunner(tmp_path / "model.onnx") as runner,
        pytest.raises(BuildError, match=r"for sm8550: it leaves to the CPU .*turned.* \(Einsum\)"),
    ):
        runner.infer({"sample": np.zeros((1, 4, 8, 8), np.float32)})


@needs_qnn
def test_reference_numerics_are_another_engines(tmp_path: Path) -> None:
    path = sigmoid_graph(tmp_path / "model.onnx")

    with pytest.raises(ConfigError, match="computes in integers alone"):
        open_runner(path, "qnn", "qnn", integer=False)
    with open_runner(path, "qnn") as runner:  # the emulator is never taken unasked
        assert isinstance(runner, OrtRunner)


def test_a_graph_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        QnnRunner(tmp_path / "model.onnx")


def test_an_unknown_chip_is_refused() -> None:
    assert chip_number("SM8650") == 57
    with pytest.raises(ConfigError, match="chip 'sm1' is unknown; there is sm8350"):
        chip_number("sm1")


def test_sizes_are_those_of_what_is_given() -> None:
    assert sizes_of({"x": ("batch", 3), "t": ("steps",)}, {"x": (2, 3), "t": (1,)}) == {"batch": 2, "steps": 1}
