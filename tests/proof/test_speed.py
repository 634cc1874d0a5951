"""A bundle that is no faster than the model it came from is said to be so, where it is made."""

import time

import numpy as np
import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.proof import speed
from tfmq_export.proof.speed import CallSpeed, call_speed


class Sleeping(nn.Module):
    """Takes its time in PyTorch."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.enter, self.seconds = nn.Conv2d(3, 3, 1), seconds

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.enter(sample) * timestep.float().cos()[:, None, None, None]


class Served:
    """A loaded bundle that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rows = seconds, set[int]()

    def __call__(self, sample: np.ndarray, timestep: np.ndarray, /) -> np.ndarray:
        self.rows.add(len(sample))
        time.sleep(self.seconds)
        return sample


def timed(model: float, bundle: float, served: Served | None = None) -> CallSpeed:
    denoiser: Denoiser = probe(Sleeping(model))
    inputs = {"sample": torch.zeros(5, 3, 8, 8), "timestep": torch.full((5,), 3)}
    return call_speed(denoiser, served or Served(bundle), inputs)  # type: ignore[arg-type]


def test_both_sides_take_the_same_call_in_turns() -> None:
    served = Served(0.01)

    found = timed(0.03, 0.01, served)

    assert served.rows == {2} == {found.rows}
    assert found.threads == torch.get_num_threads()
    assert 0.01 <= found.seconds < found.float_seconds
    assert 1 < found.times <= 3.5
    assert found.warning == ""
    assert found.describe().startswith(f"{found.times:.2f}x PyTorch in fp32: ")


@pytest.mark.parametrize(("vnni", "why"), [(True, ""), (False, ": without VNNI it has no fast 8-bit products")])
def test_a_slower_one_is_said_to_be_slower(vnni: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "adds_in_16_bits", lambda: not vnni)

    found = timed(0.005, 0.02)

    assert found.times < 1
    assert found.warning.startswith(f"no faster than PyTorch in fp32 on this processor ({found.times:.2f}x){why}")
    assert "tfmq-bench OUT --against MODEL" in found.warning


def test_a_large_model_takes_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    start = time.perf_counter()

    timed(0.2, 0.1)

    assert time.perf_counter() - start < 2 * (0.2 + 0.1) + 0.5
