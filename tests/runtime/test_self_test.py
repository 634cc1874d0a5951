"""A bundle asks the host that opens it for the prediction it brings along, and serves nothing where that is another."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from numpy.typing import NDArray
from standins.small_bundle import SHAPE, Parts, small_bundle

from tfmq_export.bundle.manifest import Bundle, LayerInfo, open_bundle
from tfmq_export.errors import ConfigError, LoadError, PrecisionError
from tfmq_export.runtime import load, self_test
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner, version
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.machine import described
from tfmq_export.runtime.self_test import FILE, LIMIT, LOWEST_LIMIT, HostCheck, SelfTest, read_self_test, require_host

Arrays = Mapping[str, NDArray[np.generic]]

SAMPLE = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
INPUTS = {"sample": SAMPLE, "timestep": np.array([500])}
PREDICTION = SAMPLE / 2 + np.float32(0.5)
LABEL = {"label": np.array([3])}
PLAIN = Parts()
CONDITIONED = [Parts(label=True), Parts(prologue="vector"), Parts(prologue="table")]


def apart(prediction: NDArray[np.float32], db: float) -> NDArray[np.float32]:
    """What ``prediction`` is so many dB away from."""
    return (prediction / (1 - 10 ** (-db / 20))).astype(np.float32)


@pytest.fixture
def tested(tmp_path: Path) -> Callable[..., Bundle]:
    """Write a bundle that predicts ``PREDICTION``, and label 3 more where it has one, with a self-test."""

    def write(
        prediction: NDArray[np.float32] = PREDICTION,
        parts: Parts = PLAIN,
        inputs: Arrays = INPUTS,
        limit: float = LIMIT,
        **provenance: str,
    ) -> Bundle:
        bundle = small_bundle(tmp_path / "bundle", parts, provenance=provenance)
        return SelfTest(inputs, prediction, limit).save(bundle)

    return write


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_a_bundle_that_predicts_the_same_is_served(tested: Callable[..., Bundle], target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = tested(parts=Parts(target=target))

    with load(bundle.root, threads=1, verify=True) as loaded:
        found = loaded.check_host()

        assert found is not None
        assert found.passed
        assert found.sqnr > 100  # fp32
        assert (found.limit, found.engine, found.host) == (LIMIT, loaded.engine, described())
    assert FILE in open_bundle(bundle.root).manifest.files


def test_what_was_saved_is_read_back(tested: Callable[..., Bundle]) -> None:
    inputs = {**INPUTS, "label": np.array([3], np.int64), "input.odd": np.zeros((1, 0), np.float16)}

    found = read_self_test(tested(inputs=inputs, limit=31.5))

    assert found is not None
    assert found.inputs.keys() == inputs.keys()
    for name, value in inputs.items():
        np.testing.assert_array_equal(found.inputs[name], value)
        assert found.inputs[name].dtype == value.dtype
    np.testing.assert_array_equal(found.prediction, PREDICTION)
    assert found.limit == 31.5


@pytest.mark.parametrize(("db", "served"), [(LIMIT + 1, True), (LIMIT - 1, False)])
def test_the_limit_decides(tested: Callable[..., Bundle], db: float, served: bool) -> None:
    bundle = tested(apart(PREDICTION, db))

    if served:
        with load(bundle.root, threads=1) as loaded:
            assert loaded.check_host() is not None
    else:
        with pytest.raises(PrecisionError):
            load(bundle.root, threads=1)


def test_a_refusal_names_host_distance_and_limit(tested: Callable[..., Bundle]) -> None:
    bundle = tested(apart(PREDICTION, 19.0), cpus="any")

    with pytest.raises(PrecisionError) as caught:
        load(bundle.root, threads=1)

    message = str(caught.value)
    assert message.startswith(f"{bundle.root}: the prediction is 19.0 dB from the stored prediction, asked >= 25.0; ")
    assert f"; onnxruntime {version()} on {described()}; " in message
    assert message.endswith("or use load(..., integer=False)")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("narrow", "provenance", "advice"),
    [
        (True, {"cpus": "vnni"}, "its weights need a CPU with VNNI, which this one has not; compile it again with"),
        (True, {}, "compile it again with --cpus any"),  # from before there was a rule
        (True, {"cpus": "any"}, "its integer kernels compute something else here"),
        (False, {"cpus": "vnni"}, "its integer kernels compute something else here"),
    ],
)
def test_a_cpu_is_blamed_only_where_its_kernels_saturate_such_weights(
    narrow: bool, provenance: dict[str, str], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "adds_in_16_bits", lambda: narrow)
    bundle = small_bundle(tmp_path / "bundle", provenance=provenance)

    with pytest.raises(PrecisionError, match=advice):
        require_host(bundle, HostCheck(17.0, LIMIT, "engine", "host"))
    require_host(bundle, HostCheck(25.0, LIMIT, "engine", "host"))


# -- what the file may have become -----------------------------------------------------------------------


def test_an_altered_or_missing_file_is_refused(tested: Callable[..., Bundle]) -> None:
    bundle = tested()
    path = bundle.root / FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(LoadError, match=r"selftest\.npz: differs from the manifest's hash"):
        load(bundle.root, threads=1)

    path.unlink()
    with pytest.raises(LoadError, match=r"selftest\.npz: missing from the bundle; compile it again"):
        load(bundle.root, threads=1)


@pytest.mark.parametrize(
    "kept",
    [
        0,
        1,
        100,
        -30,
    ],
)
def test_a_truncated_file_is_refused_even_if_the_manifest_knows_it(tested: Callable[..., Bundle], kept: int) -> None:
    bundle = tested()
    path = bundle.root / FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LoadError, match="truncated or altered"):
        load(bundle.root, threads=1)

    bundle.extended([FILE])

    with pytest.raises(LoadError, match=r"selftest\.npz: not a readable self-test .*; compile the model again"):
        load(bundle.root, threads=1)


@pytest.mark.parametrize("left_out", ["prediction", "limit"])
def test_a_file_that_lacks_something_is_refused(tested: Callable[..., Bundle], left_out: str) -> None:
    bundle = tested()
    with np.load(bundle.root / FILE) as stored:
        arrays = {name: stored[name] for name in stored.files if name != left_out}
    np.savez(bundle.root / FILE, allow_pickle=False, **arrays)
    bundle.extended([FILE])

    with pytest.raises(LoadError, match="not a readable self-test"):
        load(bundle.root, threads=1)


@pytest.mark.parametrize("prediction", [PREDICTION[:, :2], PREDICTION.repeat(2, 0), PREDICTION.reshape(1, -1)])
def test_a_prediction_of_another_shape_is_refused(
    tested: Callable[..., Bundle], prediction: NDArray[np.float32]
) -> None:
    bundle = tested(prediction)

    with pytest.raises(LoadError, match=r"selftest\.npz: a prediction of shape .*, the graph gives \[1, 3, 8, 8\]"):
        load(bundle.root, threads=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_stored_prediction_that_is_no_number_passes_nothing(tested: Callable[..., Bundle], value: float) -> None:
    prediction = PREDICTION.copy()
    prediction[0, 0, 0, 0] = value
    bundle = tested(prediction)

    with pytest.raises(PrecisionError):
        load(bundle.root, threads=1)


@pytest.mark.parametrize(
    "value",
    [
        np.nan,
        np.inf,
    ],
)
def test_an_engine_that_predicts_no_number_is_refused(
    tested: Callable[..., Bundle], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tested()
    infer = OrtRunner.infer
    monkeypatch.setattr(
        OrtRunner, "infer", lambda self, feeds: {name: x + value for name, x in infer(self, feeds).items()}
    )

    with pytest.raises(PrecisionError, match="from the stored prediction"):
        load(bundle.root, threads=1)


def test_a_limit_that_is_no_number_passes_nothing(tested: Callable[..., Bundle]) -> None:
    bundle = tested(limit=np.nan)

    with pytest.raises(PrecisionError, match="asked >= nan"):
        load(bundle.root, threads=1)


def test_a_limit_that_would_pass_anything_is_refused(tested: Callable[..., Bundle]) -> None:
    bundle = tested(limit=LOWEST_LIMIT - 1)

    with pytest.raises(LoadError, match=r"a limit of 14 dB, which is below 15"):
        load(bundle.root, threads=1)


# -- when it is asked, and with what ---------------------------------------------------------------------


def test_it_may_be_left_out(tested: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tested(apart(PREDICTION, 10.0))
    calls: list[Arrays] = []
    infer = OrtRunner.infer
    monkeypatch.setattr(OrtRunner, "infer", lambda self, feeds: calls.append(feeds) or infer(self, feeds))

    with load(bundle.root, threads=1, self_test=False) as loaded:
        assert calls == []
        found = loaded.check_host()

    assert len(calls) == 1
    assert found is not None
    assert found.sqnr == pytest.approx(10, abs=0.01)
    assert not found.passed


def test_a_bundle_without_one_is_served(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle")

    assert read_self_test(bundle) is None
    with load(bundle.root, threads=1) as loaded:
        assert loaded.check_host() is None


IN_INTEGERS = LayerInfo("conv", "conv_in", "conv", 1, 8, 8)


@pytest.mark.parametrize(
    ("target", "narrow", "warned"), [("ort-cpu", True, True), ("ort-cpu", False, False), ("tensorrt", True, False)]
)
def test_where_nobody_knows_a_warning_says_so(
    target: str,
    narrow: bool,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(self_test, "adds_in_16_bits", lambda: narrow)
    bundle = small_bundle(tmp_path / "bundle", Parts(target=target), layers=(IN_INTEGERS,))

    load(bundle.root, threads=1)

    said = [record for record in caplog.messages if "this CPU has no VNNI" in record]
    assert len(said) == warned
    assert all(message.startswith(str(bundle.root)) for message in said)
    caplog.clear()
    load(bundle.root, threads=1, self_test=False)
    assert not caplog.messages


def test_where_all_is_in_floating_point_there_is_nothing_to_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(self_test, "adds_in_16_bits", lambda: True)
    pinned = replace(IN_INTEGERS, activation_bits=0, reason="pinned")

    load(small_bundle(tmp_path / "bundle", layers=(pinned,)).root, threads=1)

    assert not caplog.messages


@pytest.mark.parametrize("parts", CONDITIONED, ids=["label", "vector", "table"])
def test_a_conditional_model_is_asked_with_its_conditioning(tested: Callable[..., Bundle], parts: Parts) -> None:
    bundle = tested(PREDICTION + 3, parts, INPUTS | LABEL)

    with load(bundle.root, threads=1) as loaded:
        found = loaded.check_host()

    assert found is not None
    assert found.sqnr > 100


@pytest.mark.parametrize("parts", CONDITIONED, ids=["label", "vector", "table"])
def test_a_wrong_conditioning_shows(tested: Callable[..., Bundle], parts: Parts) -> None:
    bundle = tested(PREDICTION + 3, parts, {**INPUTS, "label": np.array([2])})

    with pytest.raises(PrecisionError):
        load(bundle.root, threads=1)


@pytest.mark.parametrize(("parts", "graphs"), [(PLAIN, 1), (Parts(prologue="vector"), 2)])
def test_what_is_refused_gives_back_what_it_holds(
    tested: Callable[..., Bundle], parts: Parts, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = INPUTS | LABEL if parts.prologue else INPUTS
    bundle = tested(apart(PREDICTION + 3 * (graphs - 1), 10), parts, inputs)
    opened: list[OrtRunner] = []
    make = OrtRunner.__init__
    monkeypatch.setattr(
        OrtRunner, "__init__", lambda self, *args, **options: opened.append(self) or make(self, *args, **options)
    )

    with pytest.raises(PrecisionError):
        load(bundle.root, threads=1)

    assert len(opened) == graphs
    for runner in opened:
        with pytest.raises(ConfigError, match="the runner is closed"):
            runner.infer({})


class BuiltForFour:
    """An engine whose only profile is a batch of four and more."""

    inputs, outputs, engine = ("sample", "timestep"), ("prediction",), "fake"

    def __init__(self) -> None:
        self.feeds: list[Arrays] = []

    def smallest_batch(self, name: str) -> int:
        return {"sample": 4}[name]

    def infer(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        assert len(feeds["sample"]) >= 4
        self.feeds.append(feeds)
        label = feeds.get("label", np.zeros(len(feeds["sample"]))).reshape(-1, 1, 1, 1)
        prediction = feeds["sample"] / 2 + feeds["timestep"].reshape(-1, 1, 1, 1) / 1000 + label
        return {"prediction": prediction.astype(np.float32)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("label", [False, True])
def test_an_engine_for_larger_batches_is_asked_with_as_many_rows(tested: Callable[..., Bundle], label: bool) -> None:
    inputs = INPUTS | LABEL if label else INPUTS
    bundle, runner = tested(PREDICTION + 3 * label, Parts(label=label), inputs), BuiltForFour()

    found = LoadedBundle(bundle, runner).check_host()

    assert found is not None
    assert found.sqnr > 100
    assert found.engine == "fake"
    (feeds,) = runner.feeds
    assert {name: len(value) for name, value in feeds.items()} == {
        "sample": 4,
        "timestep": 1,
        **({"label": 4} if label else {}),
    }
    for row in feeds["sample"]:
        np.testing.assert_array_equal(row, SAMPLE[0])
