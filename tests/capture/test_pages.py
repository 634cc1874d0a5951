import sys
from pathlib import Path

import pytest
import torch
from standins.held_memory import held_bytes
from torch import nn

from tfmq_export.capture.pages import release_pages

MEGABYTE = 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it holds")
def test_pages_of_a_mapped_weight_are_let_go_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (64 * MEGABYTE // 256))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=16 * MEGABYTE, dtype=torch.int32)
    total = int(mapped.sum())
    held = held_bytes("RssFile")

    release_pages([mapped.view(4096, -1)[:, ::2]])

    assert held_bytes("RssFile") < held - 32 * MEGABYTE
    assert int(mapped.sum()) == total


def test_weights_that_no_file_holds_stay() -> None:
    module = nn.Linear(1000, 1000)
    before = module.weight.detach().clone()

    release_pages(module.parameters())

    assert torch.equal(module.weight, before)
