from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from standins.saturating import rule_keeping

from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.recipe.pairs import partners
from tfmq_export.runtime.engines.onnxruntime.runner import DeviceBuffers, OrtRunner


def write_gather(path: Path) -> Path:
    table = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "row"], ["value"])],
        "gather",
        [helper.make_tensor_value_info("row", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n", 2])],
        [table],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def write_quantized_matmul(path: Path) -> tuple[Path, np.ndarray]:
    """``dequantize(quantize(x)) @ weight`` and its weight, [16, 16]."""
    codes = np.random.default_rng(0).integers(-127, 128, (16, 16)).astype(np.int8)
    codes = rule_keeping(codes.T, partners(codes.T.shape)).T.copy()
    scale = np.float32(0.01)
    constants = {
        "codes": codes,
        "w_scale": scale,
        "w_zero": np.int8(0),
        "x_scale": np.float32(0.05),
        "x_zero": np.uint8(128),
    }
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["dq"]),
            helper.make_node("DequantizeLinear", ["codes", "w_scale", "w_zero"], ["w"]),
            helper.make_node("MatMul", ["dq", "w"], ["y"], name="node_linear"),
        ],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path, codes * scale


@pytest.mark.parametrize("integer", [True, False])
def test_both_numerics_compute_the_quantized_product(tmp_path: Path, integer: bool) -> None:
    path, weight = write_quantized_matmul(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    on_grid = (np.clip(np.rint(x / 0.05) + 128, 0, 255) - 128) * 0.05

    with OrtRunner(path, threads=1, integer=integer) as runner:
        y = runner.infer({"x": x})["y"]

    # One activation near a tie may take the other code: 0.05 * |w|.
    np.testing.assert_allclose(y, on_grid @ weight, atol=0.05 * np.abs(weight).max() + 1e-5)


@pytest.mark.parametrize(("integer", "kernel"), [(True, "MatMulIntegerToFloat"), (False, "MatMul")])
def test_reference_numerics_keep_the_product_in_float(tmp_path: Path, integer: bool, kernel: str) -> None:
    path, _ = write_quantized_matmul(tmp_path / "m.onnx")
    optimized = tmp_path / "optimized.onnx"

    with OrtRunner(path, threads=1, integer=integer, optimized_to=optimized):
        ops = [node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node]

    assert kernel in ops


def test_reference_numerics_hold_no_dequantized_weight(tmp_path: Path) -> None:
    path, _ = write_quantized_matmul(tmp_path / "model.onnx")

    OrtRunner(path, integer=False, optimized_to=tmp_path / "optimized.onnx")

    stored = onnx.load(tmp_path / "optimized.onnx").graph.initializer
    assert {item.data_type for item in stored if np.prod(item.dims) > 1} == {TensorProto.INT8}


def test_a_failed_run_raises_one_line_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with OrtRunner(write_gather(tmp_path / "g.onnx"), threads=1) as runner:
        with pytest.raises(BuildError) as failure:
            runner.infer({"row": np.asarray([9])})
        with pytest.raises(BuildError, match="check the inputs row"):
            runner.infer({})
        value = runner.infer({"row": np.asarray([2])})["value"]

    assert "\n" not in str(failure.value)
    np.testing.assert_array_equal(value, [[4, 5]])
    assert capfd.readouterr() == ("", "")


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads"):
        OrtRunner(tmp_path / "g.onnx", threads=0)
    with pytest.raises(ConfigError, match="provider 'tpu'"):
        OrtRunner(tmp_path / "g.onnx", provider="tpu")


def test_buffers_on_a_device_give_what_a_plain_run_gives(tmp_path: Path) -> None:
    """On the CPU as the device; on CUDA the same calls keep them there."""
    path, _ = write_quantized_matmul(tmp_path / "m.onnx")
    with OrtRunner(path, threads=1) as runner:
        buffers = DeviceBuffers(runner._session, runner._run_options, "cpu")
        results, arrays = [], []
        for turn, rows in enumerate((4, 4, 2, 4)):
            arrays.append(np.random.default_rng(turn).standard_normal((16, rows)).astype(np.float32).T)
            results.append(buffers.infer({"x": arrays[-1]})["y"])

        for x, y in zip(arrays, results, strict=True):
            np.testing.assert_array_equal(y, runner.infer({"x": np.ascontiguousarray(x)})["y"])
    assert len(buffers._idle) == 2


def test_buffers_keep_each_threads_results_apart(tmp_path: Path) -> None:
    path, _ = write_quantized_matmul(tmp_path / "m.onnx")
    with OrtRunner(path, threads=1) as runner:
        buffers = DeviceBuffers(runner._session, runner._run_options, "cpu")

        def call(seed: int) -> bool:
            x = np.random.default_rng(seed).standard_normal((1 + seed % 3, 16)).astype(np.float32)
            return bool(np.array_equal(buffers.infer({"x": x})["y"], runner.infer({"x": x})["y"]))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(100)))


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
)
def test_cuda_computes_what_the_cpu_does(tmp_path: Path) -> None:
    path, _ = write_quantized_matmul(tmp_path / "m.onnx")
    with OrtRunner(path, integer=False) as cpu, OrtRunner(path, provider="cuda") as cuda:
        for rows in (4, 4, 2):
            x = np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)
            np.testing.assert_allclose(cuda.infer({"x": x})["y"], cpu.infer({"x": x})["y"], rtol=1e-2, atol=1e-2)
    assert "compute in floating point" in cuda.engine
