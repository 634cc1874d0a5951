from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from standins.small_bundle import SHAPE, Parts, small_bundle

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.errors import BuildError, ConfigError, LoadError, TimestepError
from tfmq_export.runtime import load
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner

Write = Callable[..., Path]

NOISE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "timestep", [500, 500.0, np.int32(500), np.asarray(500), np.asarray([500]), np.asarray([500, 500])]
)
def test_a_timestep_is_a_number_or_one_or_one_per_sample(tiny_bundle: Write, timestep: object) -> None:
    with load(tiny_bundle(), threads=1) as denoise:
        prediction = denoise(NOISE, timestep)

    np.testing.assert_allclose(prediction, NOISE / 2 + 0.5, rtol=1e-6)


def test_a_model_of_one_timestep_takes_it_once_for_each_sample_as_well(tmp_path: Path) -> None:
    with load(small_bundle(tmp_path / "out", Parts(single=True)).root, threads=1) as denoise:
        samples = np.ones((4, *SHAPE), np.float32)

        np.testing.assert_array_equal(denoise(samples, np.full(4, 500)), denoise(samples, 500))


def test_each_sample_may_have_its_own_timestep(tiny_bundle: Write) -> None:
    with load(tiny_bundle(), threads=1) as denoise:
        prediction = denoise(NOISE, np.asarray([750, 250]))

    np.testing.assert_allclose(prediction[1], NOISE[1] / 2 + 0.25, rtol=1e-6)


def test_conditioning_reaches_the_graph_by_name(tiny_bundle: Write) -> None:
    with load(tiny_bundle(labels=True), threads=1) as denoise:
        prediction = denoise(NOISE, 0, label=np.asarray([3, 7]))

    np.testing.assert_allclose(prediction, NOISE / 2 + np.reshape([3, 7], (2, 1, 1, 1)), rtol=1e-6)


LABELS = np.asarray([3, 7])


@pytest.mark.parametrize(
    ("sample", "timestep", "conditioning", "said"),
    [
        (NOISE, 501, {"label": LABELS}, "timestep 501 is not in this schedule"),
        (NOISE, 499.5, {"label": LABELS}, "timestep 499.5 is not in"),
        (NOISE, float("nan"), {"label": LABELS}, "timestep nan is not in"),
        (NOISE, "500", {"label": LABELS}, "timestep: must be a number"),
        (NOISE, True, {"label": LABELS}, "timestep: must be a number"),
        (NOISE, np.asarray([0, 0, 0]), {"label": LABELS}, r"timestep: shape \[3\]"),
        (NOISE, np.asarray([[0], [0]]), {"label": LABELS}, r"timestep: shape \[2, 1\]"),
        (NOISE.astype(np.float64), 0, {"label": LABELS}, "sample: float64, needs float32"),
        (NOISE[:, :2], 0, {"label": LABELS}, r"sample: shape \[2, 2, 8, 8\], needs \[batch, 3, 8, 8\]"),
        (NOISE[0], 0, {"label": LABELS}, r"sample: shape \[3, 8, 8\]"),
        (NOISE[:0], 0, {"label": LABELS[:0]}, "sample: the batch is empty"),
        (NOISE, 0, {}, "missing conditioning label"),
        (NOISE, 0, {"label": LABELS[:1]}, "label: batch of 1, but sample has 2"),
        (NOISE, 0, {"label": LABELS.astype(np.int32)}, "label: int32, needs int64"),
        (NOISE, 0, {"label": LABELS, "prompt": LABELS}, "no input prompt"),
    ],
)
def test_a_bad_request_is_named_and_the_next_one_works(
    tiny_bundle: Write, sample: np.ndarray, timestep: object, conditioning: dict[str, np.ndarray], said: str
) -> None:
    with load(tiny_bundle(labels=True), threads=1) as denoise:
        with pytest.raises(ConfigError, match=said):
            denoise(sample, timestep, **conditioning)

        assert denoise(NOISE, 0, label=LABELS).shape == NOISE.shape


def test_a_foreign_timestep_is_a_timestep_error(tiny_bundle: Write) -> None:
    with load(tiny_bundle(), threads=1) as denoise, pytest.raises(TimestepError):
        denoise(NOISE, np.asarray([0, 1]))


def test_a_closed_bundle_says_so(tiny_bundle: Write) -> None:
    with load(tiny_bundle(), threads=1) as denoise:
        pass

    with pytest.raises(ConfigError, match="closed"):
        denoise(NOISE, 0)


def test_one_altered_number_is_found_unless_nobody_looks(tiny_bundle: Write) -> None:
    root = tiny_bundle()
    model = onnx.load(root / "unet" / "model.onnx")
    (half,) = (value for value in model.graph.initializer if value.name == "half")
    half.CopyFrom(numpy_helper.from_array(np.asarray(np.float32(0.525)), "half"))
    onnx.save(model, root / "unet" / "model.onnx")

    with pytest.raises(LoadError, match="differs from the manifest"):
        load(root)
    with load(root, verify=False) as loaded:
        np.testing.assert_allclose(loaded(NOISE, 0), 0.525 * NOISE, rtol=1e-6)


def test_files_that_serving_does_not_read_are_not_compared(tiny_bundle: Write) -> None:
    root = tiny_bundle()
    (root / "text_encoder").mkdir()
    (root / "text_encoder" / "weights").write_bytes(b"many")
    bundle = open_bundle(root).extended(["text_encoder/weights"])
    (root / "text_encoder" / "weights").write_bytes(b"other")

    load(root).runner.__exit__(None, None, None)
    with pytest.raises(LoadError, match=r"text_encoder/weights: differs"):
        bundle.verify()


def test_what_a_user_prints_fits_a_line(tiny_bundle: Write) -> None:
    root = tiny_bundle()

    with load(root, threads=1) as loaded:
        said = [repr(each) for each in (loaded, loaded.bundle, loaded.bundle.manifest, loaded.prepare())]

    assert said[:2] == [
        f"LoadedBundle({str(root)!r}, w8a8 for ort-cpu, {loaded.engine})",
        f"Bundle({str(root)!r}, w8a8 for ort-cpu)",
    ]
    assert max(map(len, said)) < 250


def test_a_graph_with_other_inputs_than_the_manifest_is_refused(
    tiny_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_bundle()
    model = onnx.load(root / "unet" / "model.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    onnx.save(model, root / "unet" / "model.onnx")

    closed: list[OrtRunner] = []
    monkeypatch.setattr(OrtRunner, "__exit__", lambda self, *error: closed.append(self))

    with pytest.raises(LoadError, match="takes pixels, timestep and gives prediction, the manifest says"):
        load(root, verify=False)
    assert len(closed) == 1  # what was opened gives back what it holds


def test_a_missing_graph_and_a_broken_one_are_told_apart(tiny_bundle: Write) -> None:
    root = tiny_bundle()
    path = root / "unet" / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BuildError, match="refuses this graph"):
        load(root, verify=False)

    path.unlink()
    with pytest.raises(LoadError, match="no such file"):
        load(root, verify=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_refused(tiny_bundle: Write, value: float) -> None:
    sample = NOISE.copy()
    sample[1, 2, 3, 4] = value

    with load(tiny_bundle(), threads=1) as denoise, pytest.raises(ConfigError, match="sample: holds NaN or infinity"):
        denoise(sample, 500)
