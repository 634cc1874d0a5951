from collections.abc import Callable

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import ExportError


class Halved(nn.Module):
    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor], kind: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.enter, self.middle, self.kind = nn.Conv2d(3, 3, 1), middle, kind

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        # An embedding that is rounded on purpose becomes a table.
        shift = timestep.float().cos().to(self.kind).mul(2).float()
        return self.middle(self.enter, sample) + shift[:, None, None, None]


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = layer(x)
    return y.float()


def rounded(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x).to(torch.bfloat16).float()
    return y


def test_a_module_that_computes_in_half_precision_is_refused_at_capture() -> None:
    with pytest.raises(ExportError, match=r"computes in bfloat16 \(conv2d") as error:
        capture(probe(Halved(under_autocast)))

    assert "leave autocast" in str(error.value)


def test_casts_alone_and_a_rounded_embedding_are_no_reason() -> None:
    assert len(capture(probe(Halved(rounded))).operations) == 1
