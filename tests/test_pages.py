"""Pages of arrays, as passes hold them."""

import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from standins.held_memory import held_bytes

from tfmq_export.pages import mapped_files, span_of
from tfmq_export.passes.reading import Computed, constant_values, release_values

MEGABYTE = 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it holds")
@pytest.mark.parametrize("lazy", [False, True], ids=["stored", "computed"])
def test_pages_of_a_constant_are_let_go_and_read_again(lazy: bool, tmp_path: Path) -> None:
    np.arange(16 * MEGABYTE, dtype=np.float32).tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, "r").reshape(4096, -1).T
    constant = gs.Constant("w", Computed(mapped, lambda: mapped * 2) if lazy else mapped)
    total = float(constant_values(constant).sum(dtype=np.float64))
    held = held_bytes("RssFile")

    release_values(constant)

    assert held_bytes("RssFile") < held - 32 * MEGABYTE
    assert float(constant_values(constant).sum(dtype=np.float64)) == total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it holds")
def test_what_no_file_holds_is_not_sent_to_swap(tmp_path: Path) -> None:
    np.zeros(MEGABYTE, np.float32).tofile(tmp_path / "weights")
    mapped, plain = np.memmap(tmp_path / "weights", np.float32, "r"), np.zeros(4 * MEGABYTE, np.float32)

    for values, files in ((mapped, 1), (plain, 0)):
        first, end = span_of(values.__array_interface__["data"][0], 4, values.shape, values.strides)
        assert sum(low <= first and end <= high for low, high in mapped_files()) == files
