"""Engines from a file: what is refused is refused for real; sessions run on a stand-in for TensorRT and the GPU."""

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from standins import trt_standin
from standins.tensorrt_patterns import plain, save
from standins.trt_standin import HAS_COMPILER, Driver

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.engines.tensorrt import runner as trt_runner
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions, build_engine
from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu
from tfmq_export.runtime.engines.tensorrt.device_array import DeviceArray, as_device_array
from tfmq_export.runtime.engines.tensorrt.runner import TrtRunner
from tfmq_export.runtime.engines.tensorrt.session import EngineSession

has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")
has_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU")

BATCHES = [(1, 2, 4), (8, 8, 16)]


def feeds(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sample = rng.standard_normal((batch, 3, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": rng.integers(0, 1000, batch)}


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    return given["sample"] / 2 + given["timestep"].reshape(-1, 1, 1, 1).astype(np.float32)


def assert_right(given: dict[str, np.ndarray], prediction: np.ndarray) -> None:
    np.testing.assert_allclose(prediction, expected(given), rtol=1e-6)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    if not HAS_COMPILER:
        pytest.skip("needs a C compiler")
    return Driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def library(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = trt_standin.library(driver, BATCHES)
    monkeypatch.setattr(trt_runner, "import_tensorrt", lambda flavour: module)
    return module


@pytest.fixture
def runner(tmp_path: Path, driver: Driver, library: SimpleNamespace) -> Iterator[TrtRunner]:
    path = tmp_path / "unet.engine"
    path.write_bytes(trt_standin.ENGINE)
    driver.launches = 0
    with TrtRunner(path, flavour="tensorrt", device=driver.device()) as opened:
        yield opened
    assert driver.held == 0, "memory, streams or contexts were left behind"


@pytest.fixture
def session(runner: TrtRunner) -> Iterator[EngineSession]:
    with runner.session() as opened:
        yield opened


def test_an_engine_computes_what_it_is_fed(runner: TrtRunner) -> None:
    assert (runner.inputs, runner.outputs) == (("sample", "timestep"), ("prediction",))
    assert runner.engine == "TensorRT 11.4.0 on Stand-in"
    for batch in (2, 1, 4, 8, 2, 16):
        given = feeds(batch, batch)
        assert_right(given, runner.infer(given)["prediction"])


def test_arrays_need_not_be_contiguous(runner: TrtRunner) -> None:
    given = feeds(4)
    given["sample"] = given["sample"].transpose(0, 1, 3, 2)

    assert_right(given, runner.infer(given)["prediction"])


def test_results_outlive_the_next_run(runner: TrtRunner) -> None:
    given = feeds(2)
    first = runner.infer(given)["prediction"]
    runner.infer(feeds(2, seed=1))

    assert_right(given, first)


def test_a_run_that_repeats_becomes_a_graph(runner: TrtRunner, driver: Driver, library: SimpleNamespace) -> None:
    for seed in range(5):
        given = feeds(2, seed)
        assert_right(given, runner.infer(given)["prediction"])

    assert driver.launches == 4
    (context,) = library.engines[0].contexts
    assert context.runs == 2  # once as it is, once to be captured


def test_a_graph_ends_with_its_shapes_and_never_holds_the_first_run(runner: TrtRunner, driver: Driver) -> None:
    for batch in (2, 2, 4, 2, 2):
        given = feeds(batch, batch)
        assert_right(given, runner.infer(given)["prediction"])

    assert driver.launches == 2


def test_graphs_can_be_left_out(tmp_path: Path, driver: Driver, library: SimpleNamespace) -> None:
    path = tmp_path / "unet.engine"
    path.write_bytes(trt_standin.ENGINE)
    driver.launches = 0

    with TrtRunner(path, flavour="tensorrt", device=driver.device(), cuda_graphs=False) as opened:
        for _ in range(3):
            opened.infer(feeds(2))

    assert driver.launches == 0


def test_tensorrt_rtx_captures_by_itself(tmp_path: Path, driver: Driver, library: SimpleNamespace) -> None:
    path = tmp_path / "unet.engine"
    path.write_bytes(trt_standin.ENGINE)
    driver.launches = 0

    with TrtRunner(path, flavour="tensorrt-rtx", device=driver.device()) as opened:
        assert opened._config.cuda_graph_strategy == "whole"
        for _ in range(3):
            opened.infer(feeds(2))

    assert driver.launches == 0


BAD = [
    ({"sample": feeds(2)["sample"]}, "missing input timestep; the engine takes sample, timestep"),
    ({**feeds(2), "label": np.zeros(2)}, "there is no input label"),
    ({**feeds(2), "timestep": np.zeros(2, np.int32)}, "timestep is int32, needs int64"),
    (feeds(5), r"sample \[5, 3, 8, 8\], built for \[1, 3, 8, 8\] to \[4, 3, 8, 8\] and \[8, 3, 8, 8\] to \[16, 3, 8"),
    (feeds(17), r"split the batch, or build an engine for it \(tfmq-build --batch\)"),
    ({**feeds(2), "timestep": np.zeros(8, np.int64)}, "these shapes together are in no profile"),
    ({**feeds(2), "sample": np.zeros((2, 3, 8), np.float32)}, r"sample \[2, 3, 8\], built for"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_input_is_named_and_the_next_run_works(runner: TrtRunner, bad: dict[str, np.ndarray], said: str) -> None:
    runner.infer(feeds(2))
    with pytest.raises(ConfigError, match=said):
        runner.infer(bad)
    given = feeds(2, seed=1)

    assert_right(given, runner.infer(given)["prediction"])


def test_a_run_that_fails_costs_its_context_and_no_more(runner: TrtRunner, library: SimpleNamespace) -> None:
    runner.infer(feeds(2))
    library.engines[0].contexts[0].fails = True
    with pytest.raises(BuildError, match="the engine cannot run"):
        runner.infer(feeds(4))
    given = feeds(4)

    assert_right(given, runner.infer(given)["prediction"])
    assert len(library.engines[0].contexts) == 2


def test_memory_that_does_not_suffice_is_an_error_and_is_given_back(runner: TrtRunner, driver: Driver) -> None:
    driver.library.standin_memory(1000)
    try:
        with pytest.raises(BuildError, match="out of memory"):
            runner.infer(feeds(16))
    finally:
        driver.library.standin_memory(1 << 30)

    assert runner.infer(feeds(16))["prediction"].shape == (16, 3, 8, 8)


def test_threads_get_their_own_results_and_contexts(runner: TrtRunner, library: SimpleNamespace) -> None:
    wrong: list[int] = []
    gate = threading.Barrier(4)

    def call(number: int) -> None:
        gate.wait()
        for turn in range(20):
            given = feeds(1 + (number + turn) % 4, seed=number * 100 + turn)
            if not np.allclose(runner.infer(given)["prediction"], expected(given), rtol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert 1 <= len(library.engines[0].contexts) <= 4


def test_steps_are_enqueued_on_the_device_and_read_once(session: EngineSession) -> None:
    given = feeds(2)
    timesteps = session.upload(np.asarray([3, 2, 1], np.int64))
    current: object = session.upload(given["sample"])

    for step in range(3):
        both = session.upload(np.repeat(timesteps_of(session, timesteps[step : step + 1]), 2))
        current = session.enqueue({"sample": current, "timestep": both})["prediction"]
        current = session.upload(session.download(current))

    np.testing.assert_allclose(session.download(current), ((given["sample"] / 2 + 3) / 2 + 2) / 2 + 1, rtol=1e-6)


def timesteps_of(session: EngineSession, array: DeviceArray) -> np.ndarray:
    return session.download(array)


def test_arrays_on_the_device_are_read_where_they_are(session: EngineSession, library: SimpleNamespace) -> None:
    given = feeds(2)
    there = {name: session.upload(value) for name, value in given.items()}

    returned = session.enqueue(there)["prediction"]

    context = library.engines[0].contexts[-1]
    assert {name: context.addresses[name] for name in there} == {name: each.address for name, each in there.items()}
    assert context.addresses["prediction"] == returned.address
    assert_right(given, session.download(returned))


def test_the_same_addresses_again_become_a_graph(session: EngineSession, driver: Driver) -> None:
    there = {name: session.upload(value) for name, value in feeds(2).items()}
    other = {**there, "sample": session.upload(feeds(2, seed=1)["sample"])}

    for arrays in (there, there, there, other, there):
        session.enqueue(arrays)

    assert driver.launches == 2


def test_arrays_of_another_stream_need_that_stream(session: EngineSession) -> None:
    given = feeds(2)
    foreign = {**given, "sample": Foreign(session.upload(given["sample"]))}

    with pytest.raises(ConfigError, match="sample: made on another stream than the session's"):
        session.enqueue(foreign)
    returned = session.enqueue(foreign, stream=7)["prediction"]

    assert returned.stream == 7
    assert_right(given, session.download(returned))


class Foreign:
    """As torch hands out its arrays: version 2, no stream."""

    def __init__(self, array: DeviceArray) -> None:
        facts = array.__cuda_array_interface__
        self.__cuda_array_interface__ = {key: facts[key] for key in ("shape", "typestr", "data", "strides")}


def test_an_array_on_the_device_tells_others_where_it_is() -> None:
    array = DeviceArray(4096, (4, 2), np.dtype(np.float32), 7)

    facts = array.__cuda_array_interface__
    assert (facts["data"], facts["shape"], facts["typestr"], facts["stream"]) == ((4096, False), (4, 2), "<f4", 7)
    assert as_device_array("x", array) == array
    assert array[1:3] == DeviceArray(4096 + 8, (2, 2), np.dtype(np.float32), 7)
    with pytest.raises(ConfigError, match="take consecutive ones"):
        array[::2]


@pytest.mark.parametrize(("strides", "fits"), [((8, 4), True), ((4, 16), False), (None, True)])
def test_only_contiguous_arrays_are_taken(strides: tuple[int, ...] | None, fits: bool) -> None:
    facts = {"shape": (4, 2), "typestr": "<f4", "data": (4096, False), "strides": strides}
    array = SimpleNamespace(__cuda_array_interface__=facts)

    if fits:
        assert as_device_array("x", array).shape == (4, 2)
    else:
        with pytest.raises(ConfigError, match="x: its rows are not contiguous"):
            as_device_array("x", array)


def test_a_closed_runner_and_a_closed_session_say_so(runner: TrtRunner) -> None:
    with runner.session() as session:
        pass
    with pytest.raises(ConfigError, match="the engine is closed"):
        session.enqueue(feeds(2))
    runner.__exit__(None, None, None)
    with pytest.raises(ConfigError, match="the runner is closed"):
        runner.infer(feeds(2))


def test_what_is_no_engine_is_refused_in_the_librarys_words(
    tmp_path: Path, driver: Driver, library: SimpleNamespace
) -> None:
    path = tmp_path / "unet.engine"
    path.write_bytes(trt_standin.ENGINE[:4])

    with pytest.raises(BuildError, match=r"tensorrt 11.4.0 opens on Stand-in \(SM 89\): plan.header.size == blobSize"):
        TrtRunner(path, flavour="tensorrt", device=driver.device())

    assert driver.held == 0


def test_options_out_of_range_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flavour 'rtx' is unknown"):
        TrtRunner(tmp_path / "m.engine", flavour="rtx")
    with pytest.raises(ConfigError, match="only TensorRT-RTX keeps a runtime cache"):
        TrtRunner(tmp_path / "m.engine", flavour="tensorrt", runtime_cache=tmp_path / "cache")
    with pytest.raises(LoadError, match="no such engine; build it with tfmq-build"):
        TrtRunner(tmp_path / "m.engine", flavour="tensorrt")


@has_rtx
@no_gpu
def test_a_real_engine_on_a_machine_without_a_gpu_says_what_is_missing(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)
    build = build_engine(model, tmp_path / "m.engine", BuildOptions(compute_capabilities=(89,)))

    with pytest.raises(DependencyError, match=r"no NVIDIA driver here|finds no GPU"):
        TrtRunner(build.path, flavour="tensorrt-rtx")


@has_rtx
@has_compiler
@no_gpu
@pytest.mark.parametrize("size", [None, 1000, 3])
def test_the_real_library_refuses_in_its_own_words(tmp_path: Path, driver: Driver, size: int | None) -> None:
    """Without a driver it opens nothing; what is cut it recognizes before that."""
    build = build_engine(save(tmp_path / "m.onnx", plain), tmp_path / "m.engine", BuildOptions())
    build.path.write_bytes(build.path.read_bytes()[:size])
    said = "CUDA driver version is insufficient" if size is None else "Serialization|bufferSize >= minBufferSize"

    with pytest.raises(BuildError, match=f"this is no engine that tensorrt_rtx .* opens .*({said})"):
        TrtRunner(build.path, flavour="tensorrt-rtx", device=driver.device())

    assert driver.held == 0


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_library_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"")

    with pytest.raises(DependencyError, match=r"TensorRT is not installed .*pip install 'tfmq-export\[tensorrt\]'"):
        TrtRunner(path, flavour="tensorrt")


@pytest.mark.gpu
@has_rtx
def test_an_engine_of_this_gpu_computes_what_onnxruntime_does(tmp_path: Path) -> None:
    from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
    from tfmq_export.runtime.engines.tensorrt.cuda_driver import gpu_capability
    from tfmq_export.runtime.measure.compare import sqnr_db

    model = save(tmp_path / "m.onnx", plain)
    build = build_engine(model, tmp_path / "m.engine", BuildOptions(compute_capabilities=(gpu_capability(),)))

    with (
        OrtRunner(model, integer=False) as reference,
        TrtRunner(build.path, flavour="tensorrt-rtx", runtime_cache=tmp_path / "cache") as engine,
    ):
        assert engine.inputs == reference.inputs
        (name,) = engine.inputs
        for batch in (2, 2, 2, 1, 8):
            x = np.random.default_rng(batch).standard_normal((batch, 16, 8, 8)).astype(np.float32)
            wanted, given = reference.infer({name: x}), engine.infer({name: x})
            for output in engine.outputs:
                assert sqnr_db(wanted[output], given[output]) > 40  # float16 sums
        with engine.session() as session:
            enqueued = session.enqueue({name: session.upload(x)})
            for output, value in engine.infer({name: x}).items():
                np.testing.assert_array_equal(session.download(enqueued[output]), value)
    assert (tmp_path / "cache").stat().st_size > 0
