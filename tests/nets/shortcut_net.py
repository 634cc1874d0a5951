"""A network with cheap 1 x 1 convolutions at the sample's size, below it, and others."""

import torch
from torch import Tensor, nn


class Shortcuts(nn.Module):
    """1 x 1 convolutions at the sample's size and below it, a wide one, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 128, 3, stride=2, padding=1)
        self.below = nn.Conv2d(128, 128, 1)
        self.body = nn.Conv2d(128, 128, 3, padding=1)
        self.embed = nn.Linear(1, 128)
        self.up = nn.ConvTranspose2d(128, 64, 2, stride=2)
        self.wide = nn.Conv2d(64, 64, 1)
        self.grouped = nn.Conv2d(64, 8, 1, groups=8)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.conv_in(sample)
        h = self.below(self.down(x)) + self.embed(timestep.float()[:, None])[:, :, None, None]
        h = self.wide(self.up(self.body(h).relu()))
        return self.conv_out(self.shortcut(x) + self.grouped(h))
