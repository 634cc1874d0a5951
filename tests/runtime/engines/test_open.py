"""Which engine opens a bundle."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from standins import trt_standin

from tfmq_export.bundle.manifest import EngineInfo, open_bundle
from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime import load
from tfmq_export.runtime.engines.onnxruntime import runner as ort_runner
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.openvino import runner as openvino_runner
from tfmq_export.runtime.engines.openvino.runner import OpenVinoRunner
from tfmq_export.runtime.engines.tensorrt import runner as trt_runner
from tfmq_export.runtime.engines.tensorrt.choose import EngineHost, choose_engine
from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu

pytest.importorskip("openvino")

Write = Callable[..., Path]

NOISE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("target", "options", "runner"),
    [
        ("openvino", {}, OpenVinoRunner),
        ("ort-cpu", {}, OrtRunner),
        ("tensorrt", {}, OrtRunner),
        ("openvino", {"backend": "onnxruntime"}, OrtRunner),
        # The reference is ONNX's own arithmetic, whatever the target.
        ("openvino", {"integer": False}, OrtRunner),
        ("openvino", {"integer": False, "backend": "openvino"}, OpenVinoRunner),
    ],
)
def test_a_bundle_opens_on_its_targets_engine_unless_told_otherwise(
    tiny_bundle: Write, target: str, options: dict[str, object], runner: type
) -> None:
    with load(tiny_bundle(target=target), threads=1, **options) as denoise:
        prediction = denoise(NOISE, np.asarray([750, 250]))

    assert isinstance(denoise.runner, runner)
    # Where the two terms cancel, one rounding of either is all that is left.
    np.testing.assert_allclose(prediction, NOISE / 2 + np.reshape([0.75, 0.25], (2, 1, 1, 1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_openvino_runs_only_what_was_compiled_for_it(target: str, tiny_bundle: Write) -> None:
    with pytest.raises(ConfigError, match=f"compiled for {target}; OpenVINO computes such a graph wrongly"):
        load(tiny_bundle(target=target), backend="openvino")


def test_an_unknown_backend_is_refused(tiny_bundle: Write) -> None:
    with pytest.raises(
        ConfigError,
        match="backend 'tpu' is unknown; use one of auto, onnxruntime, onnx",
    ):
        load(tiny_bundle(), backend="tpu")


@pytest.mark.parametrize("bad", [NOISE[:, :2], NOISE[0], NOISE.astype(np.float64)])
def test_openvino_never_sees_a_bad_request(tiny_bundle: Write, bad: np.ndarray) -> None:
    with load(tiny_bundle(target="openvino"), threads=1) as denoise:
        expected = denoise(NOISE, 0)
        with pytest.raises(ConfigError, match="sample: "):
            denoise(bad, 0)

        np.testing.assert_array_equal(denoise(NOISE, 0), expected)


def engine(*capabilities: int, flavour: str = "tensorrt-rtx", version: str = "1.7.1") -> EngineInfo:
    name = "-".join(map(str, capabilities))
    return EngineInfo(f"unet/engines/{name}.engine", "unet/model.onnx", flavour, version, capabilities, 9, ({},))


L4 = EngineHost("tensorrt-rtx", "1.7.1", 89)


def test_the_engine_made_for_the_fewest_other_gpus_is_taken() -> None:
    assert choose_engine([engine(80, 89, 120), engine(80), engine(89), engine(120)], L4) == engine(89)


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        ([], "none was built"),
        ([engine(80, 120)], r"80-120.engine: for SM 80, 120, this GPU is SM 89"),
        ([engine(89, version="1.6.0")], "89.engine: of TensorRT-RTX 1.6.0, 1.7.1 is installed"),
        ([engine(89, flavour="tensorrt", version="11.4")], "89.engine: for TensorRT"),
        ([engine(80), engine(89, version="1.8")], r"80.engine: for SM 80.*; 89.engine: of TensorRT-RTX 1.8"),
    ],
)
def test_each_engine_that_does_not_run_here_is_told_why(engines: list[EngineInfo], said: str) -> None:
    with pytest.raises(ConfigError, match=f"no engine of this bundle runs here .*{said}.*build one with tfmq-build"):
        choose_engine(engines, L4)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_that_was_not_built_is_asked_for(tiny_bundle: Write, backend: str) -> None:
    with pytest.raises(ConfigError, match=r"no engine for TensorRT.* was built from it; build one with tfmq-build"):
        load(tiny_bundle(target="tensorrt-rtx"), backend=backend)


def test_reference_numerics_are_not_an_engines(tiny_bundle: Write) -> None:
    with pytest.raises(ConfigError, match="tensorrt has no reference numerics; use the onnxruntime backend"):
        load(tiny_bundle(target="tensorrt"), backend="tensorrt", integer=False)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_a_bundle_with_an_engine_runs_on_onnxruntime_and_says_why(
    tiny_bundle: Write, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    root = tiny_bundle(target="tensorrt-rtx")
    path = root / "unet/engines/89.engine"
    path.parent.mkdir()
    path.write_bytes(b"an engine")
    open_bundle(root).extended(["unet/engines/89.engine"], [engine(89)])

    with load(root, threads=1) as denoise:
        assert denoise(NOISE, 0).shape == NOISE.shape
    assert isinstance(denoise.runner, OrtRunner)
    assert "on ONNX Runtime, in floating point: no NVIDIA driver here" in caplog.text
    with pytest.raises(DependencyError, match=r"no NVIDIA driver here|finds no GPU"):
        load(root, backend="tensorrt-rtx")


def test_an_engine_of_another_size_is_never_opened(
    tiny_bundle: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the GPU everything is real; that one is a stand-in of compute capability 8.9."""
    rtx = pytest.importorskip("tensorrt_rtx")
    if not trt_standin.HAS_COMPILER:
        pytest.skip("needs a C compiler")
    driver = trt_standin.Driver(tmp_path)
    monkeypatch.setattr(trt_runner, "CudaDevice", driver.device)
    root = tiny_bundle(target="tensorrt-rtx")
    path = root / "unet/engines/89.engine"
    path.parent.mkdir()
    path.write_bytes(b"an engine")
    open_bundle(root).extended(["unet/engines/89.engine"], [engine(89, version=rtx.__version__)])

    path.write_bytes(b"an eng")
    with pytest.raises(LoadError, match="6 bytes, the manifest says 9; build it again"):
        load(root, verify=False)
    path.unlink()
    with pytest.raises(LoadError, match="no such engine"):
        load(root, verify=False)

    assert driver.held == 0


def test_what_runs_is_told(tiny_bundle: Write) -> None:
    with load(tiny_bundle(target="openvino"), precision="bf16") as denoise:
        assert denoise.engine == f"openvino {openvino_runner.version()}, floats in bf16"
    with open_runner(denoise.bundle.model, "openvino") as runner:
        assert runner.engine.endswith("floats in f32")
    with open_runner(denoise.bundle.model, "ort-cpu") as runner:
        assert runner.engine == f"onnxruntime {ort_runner.version()}"


def test_a_precision_is_openvinos_alone(tiny_bundle: Write) -> None:
    with pytest.raises(ConfigError, match="precision 'bf16' is OpenVINO's option; onnxruntime computes in"):
        load(tiny_bundle(), precision="bf16")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_and_never_replaced(tiny_bundle: Write) -> None:
    with pytest.raises((BuildError, DependencyError), match="CUDAExecutionProvider"):
        load(tiny_bundle(), backend="onnxruntime-cuda")
