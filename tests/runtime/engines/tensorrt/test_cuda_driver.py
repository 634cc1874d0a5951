"""The driver's calls, through ctypes, against a stand-in on host memory."""

import numpy as np
import pytest
from standins.trt_standin import HAS_COMPILER, Driver

from tfmq_export.errors import BuildError, DependencyError
from tfmq_export.runtime.engines.tensorrt.cuda_driver import CudaDevice, gpu_capability, has_gpu

has_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("driver"))


@has_compiler
def test_bytes_go_to_the_device_and_come_back(driver: Driver) -> None:
    array, back = np.arange(12.0, dtype=np.float32).reshape(3, 4), np.zeros((3, 4), np.float32)
    device = driver.device()

    with device.current():
        stream, address = device.create_stream(), device.allocate(array.nbytes)
        device.upload(array, address, stream)
        device.download(address, back, stream)
        device.synchronize(stream)
        device.free(address)
        device.destroy_stream(stream)
    device.close()
    device.close()

    np.testing.assert_array_equal(back, array)
    assert driver.held == 0
    assert (device.name, device.capability) == ("Stand-in", 89)


@has_compiler
def test_a_captured_graph_runs_when_it_is_launched_and_not_before(driver: Driver) -> None:
    device, runs = driver.device(), []

    with device.current():
        stream = device.create_stream()
        graph = device.capture(stream, lambda: driver.enqueue(lambda: runs.append(1)))
        assert runs == []
        device.launch(graph, stream)
        device.launch(graph, stream)
        device.destroy_graph(graph)
        device.destroy_stream(stream)
    device.close()

    assert runs == [1, 1]
    assert driver.held == 0


@has_compiler
def test_a_failed_capture_leaves_the_stream_as_it_was(driver: Driver) -> None:
    device = driver.device()

    def work() -> None:
        raise BuildError("cannot run")

    with device.current():
        stream = device.create_stream()
        with pytest.raises(BuildError, match="cannot run"):
            device.capture(stream, work)
        device.synchronize(stream)  # refused while it captures
        device.destroy_stream(stream)
    device.close()


@has_compiler
def test_a_refusal_of_the_driver_is_told_in_its_own_words(driver: Driver) -> None:
    device = driver.device()

    with (
        device.current(),
        pytest.raises(BuildError, match="refuses cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY out"),
    ):
        device.allocate(1 << 40)
    device.close()

    assert driver.held == 0


@has_compiler
def test_a_gpu_that_is_not_there_is_refused(driver: Driver) -> None:
    with pytest.raises(DependencyError, match="there is no GPU 3; the driver sees 1"):
        CudaDevice(3, library=driver.path)

    driver.library.standin_devices(0)
    try:
        with pytest.raises(DependencyError, match="finds no GPU: CUDA_ERROR_NO_DEVICE"):
            driver.device()
    finally:
        driver.library.standin_devices(1)


@has_compiler
def test_a_gpu_that_does_not_answer_counts_as_none(driver: Driver) -> None:
    assert has_gpu(library=driver.path)
    driver.library.standin_broken(1)
    try:
        with pytest.raises(BuildError, match="out of memory"):
            driver.device()
        assert not has_gpu(library=driver.path)
    finally:
        driver.library.standin_broken(0)


def test_a_machine_without_a_driver_says_so() -> None:
    if has_gpu():
        pytest.skip("there is a GPU")

    with pytest.raises(DependencyError, match=r"no NVIDIA driver here|finds no GPU"):
        gpu_capability()
    with pytest.raises(DependencyError, match=r"no NVIDIA driver here \(libnothing.so cannot be loaded\)"):
        CudaDevice(library="libnothing.so")
