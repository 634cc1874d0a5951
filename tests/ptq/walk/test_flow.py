"""Rows of one network, block by block."""

import os
import subprocess
import sys

import pytest

WALK = """
import torch
from types import SimpleNamespace
from standins.held_memory import held_bytes
from tfmq_export.ptq.walk.activation_cache import ActivationCache
from tfmq_export.ptq.walk.calibration import CalibrationRows
from tfmq_export.ptq.walk.flow import Flow

rows = CalibrationRows({"x": torch.ones(30, 1)}, torch.zeros(30, dtype=torch.int64), 1, False)
flow = Flow(rows, {}, ActivationCache(30), torch.device("cpu"))
kept, before = [], held_bytes("RssAnon")
for picks in flow.chunks(SimpleNamespace(rows_at_once=1)):
    value = torch.ones(len(picks), 320, 64, 64)
    for layer in range(4):  # large values that are let go, and a little that is kept of each
        value = value.transpose(2, 3).contiguous() + 1
        kept.append(value.amin((0, 2, 3)))
        value = torch.cat([value, value], 1)[:, :320].contiguous()
    del value
print((held_bytes("RssAnon") - before) / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_of_rows_holds_no_more_memory_than_its_size() -> None:
    found_as_here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WALK], env=found_as_here, capture_output=True, check=True)

    assert float(done.stdout) < 64  # MB, of some hundred kB; 1,200 where freed pages are not given back
