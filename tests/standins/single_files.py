"""What tests of single files share: weights to tell names apart by, and how a file is opened."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tfmq_export.models.layouts.find import find_layout
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.read import read_layout

State = dict[str, Tensor]
ALIKE = {"rtol": 1e-4, "atol": 1e-5}
"""Two spellings of one function in float32."""


def trained(module: nn.Module) -> nn.Module:
    """Weights that no initialization gives: norms with gains and shifts of their own among them."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return module.eval()


def opened(path: Path) -> Opened:
    return read_layout(find_layout(path))
