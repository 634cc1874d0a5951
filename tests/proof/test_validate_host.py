"""``tfmq-validate OUT --host``: whether this host's kernels compute what was proven, without the model."""

from pathlib import Path

import numpy as np
import pytest
from standins.commands import run
from standins.small_bundle import SHAPE, Parts, small_bundle

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.runtime.self_test import FILE, SelfTest

SAMPLE = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
INPUTS = {"sample": SAMPLE, "timestep": np.array([500]), "label": np.array([3])}
PREDICTION = SAMPLE / 2 + np.float32(3.5)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return SelfTest(INPUTS, PREDICTION).save(small_bundle(tmp_path / "bundle", Parts(label=True)))


def test_a_host_that_predicts_the_same_is_told_in_one_line(bundle: Bundle) -> None:
    result = run("validate", bundle.root, "--host")

    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{bundle.root}: ")
    assert "dB from the stored prediction, asked >= 25.0; onnxruntime " in result.output
    assert result.output.count("\n") == 1


def test_another_prediction_exits_with_6(bundle: Bundle) -> None:
    SelfTest(INPUTS, PREDICTION * np.float32(1.1)).save(bundle)

    result = run("validate", bundle.root, "--host")

    assert result.exit_code == 6
    assert result.output.startswith(f"error: {bundle.root}: the prediction is 20.8 dB from the stored prediction")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("file", [FILE, "unet/model.onnx"])
def test_an_altered_file_is_no_fault_of_the_host(bundle: Bundle, file: str) -> None:
    with (bundle.root / file).open("ab") as stream:
        stream.write(b"\0")

    result = run("validate", bundle.root, "--host")

    assert result.exit_code == 3
    assert f"{file}: differs from the manifest's hash" in result.output
    assert result.output.count("\n") == 1


def test_an_older_bundle_has_nothing_to_ask(tmp_path: Path) -> None:
    older = small_bundle(tmp_path / "older")

    result = run("validate", older.root, "--host")

    assert result.exit_code == 2
    assert "brings no self-test; an older version wrote it, compile the model again" in result.output
    assert result.output.count("\n") == 1


def test_a_model_or_the_host_must_be_named(bundle: Bundle) -> None:
    result = run("validate", bundle.root)

    assert result.exit_code == 2
    assert result.output.startswith("error: give the model to compare with, --against MODEL, or --host")
    assert result.output.count("\n") == 1


def test_what_is_no_bundle_is_no_host_either(tmp_path: Path) -> None:
    result = run("validate", tmp_path, "--host")

    assert result.exit_code == 3
    assert "not a bundle" in result.output
