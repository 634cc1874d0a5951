"""Which engine opens a bundle."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.runtime import load
from tfmq_export.runtime.openvino_runner import OpenVinoRunner
from tfmq_export.runtime.ort_runner import OrtRunner

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
