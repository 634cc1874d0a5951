"""Layers and channels that give nothing, as zero convolutions and pruning leave them, and biases that give all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tfmq_export
from tfmq_export.config import CompileConfig
from tfmq_export.runtime.measure.compare import Metric

CHANNELS = 16


class Net(nn.Module):
    """Two convolutions around a middle that depends on the kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.last = (nn.Conv2d(*ends, 3, padding=1) for ends in ((3, CHANNELS), (CHANNELS, 3)))
        self.time = nn.Linear(1, CHANNELS)
        self.zero, self.biased = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2))
        self.pooled = nn.Linear(CHANNELS, CHANNELS)
        with torch.no_grad():
            if kind == "zero layer":  # as ControlNets begin
                self.zero.weight.zero_()
                self.zero.bias.zero_()
            if kind == "zero channels":
                self.pooled.weight[:4].zero_()
                self.pooled.bias[:4] = torch.tensor([-0.4, -0.3, 0.3, 0.4])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(sample) + self.time(timestep.float()[:, None] / 1000)[..., None, None]
        if self.kind == "dead input":
            middle = self.biased((h - 1e3).relu())
        elif self.kind == "zero channels":
            middle = self.pooled(h.mean((2, 3)) * 600)[..., None, None].expand_as(h) / 100
            middle = torch.cat([middle[:, :4] * 100, middle[:, 4:]], 1)
        else:
            middle = self.biased(self.zero(h) if self.kind == "zero layer" else h)
        return self.last(nn.functional.silu(h + middle))


@pytest.mark.parametrize("kind", ["zero layer", "dead input", "zero channels"])
def test_what_gives_nothing_costs_nothing(kind: str, tmp_path: Path) -> None:
    net = Net(kind)

    def draw(seed: int) -> Tensor:
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in (900, 500, 100):
            x = x - net(x, torch.tensor([step])) / 6
        return x[0]

    config = CompileConfig(effort="fast", validation_images=2)
    made = tfmq_export.compile(net, tmp_path / "out", draw=draw, config=config)

    assert made.validation.report[Metric.STEP_SQNR].mean > 25
