"""For every worker of pytest-xdist, before anything imports torch."""

import os

import pytest

# Two processes with two spinning threads each slow each other five to ten times on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


pytest_plugins = ["standins.tiny_bundle"]  # a fixture that many rooms share


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is a group unless a test says otherwise, and the longest groups start first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: "e2e" not in item.path.parts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu

    if item.get_closest_marker("gpu") is not None and not has_gpu():
        pytest.skip("needs an NVIDIA GPU")
