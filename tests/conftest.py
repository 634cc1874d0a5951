"""For every worker of pytest-xdist, before anything imports torch."""

import os

import pytest

# Two processes with two spinning threads each slow each other five to ten times on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


pytest_plugins = ["standins.tiny_bundle"]  # a fixture that many rooms share


def pytest_runtest_setup(item: pytest.Item) -> None:
    from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu

    if item.get_closest_marker("gpu") is not None and not has_gpu():
        pytest.skip("needs an NVIDIA GPU")
