"""A denoiser of short clips whose samples lie in their values in every way that video models know."""

import torch
from torch import Tensor, nn
from torch.nn import functional

FRAMES, CHANNELS, SIDE = 3, 8, 4


class Clip(nn.Module):
    """[B, 3, F, H, W]: frames in the batch, time repeated for each, pixels in the batch, the batch behind the tokens.

    Args:
        interleave: Whether time is repeated sample by sample; else whole batches are.
    """

    def __init__(self, *, interleave: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.interleave = interleave
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.time, self.project = nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.over_time, self.sizes = nn.Linear(CHANNELS, CHANNELS), nn.Linear(8, CHANNELS)
        self.last = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, sample: Tensor, timestep: Tensor, sizes: Tensor) -> Tensor:
        frames = sample.shape[2]
        angles = timestep[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5])
        emb = functional.silu(self.time(angles.sin()))
        emb = emb.repeat_interleave(frames, dim=0) if self.interleave else emb.repeat(frames, 1)
        h = self.enter(sample.transpose(1, 2).flatten(0, 1))  # [B F, C, H, W]
        h = h + self.project(emb)[:, :, None, None]
        # The batch of the sizes enters through a reshape, as SDXL's does.
        told = self.sizes(
            (sizes.flatten()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5])).sin().reshape(sample.shape[0], -1)
        )
        h = h.unflatten(0, (-1, frames)) + told[:, None, :, None, None]
        pixels = h.permute(0, 3, 4, 1, 2).reshape(-1, frames, CHANNELS)  # [B H W, F, C]
        pixels = pixels + self.over_time(pixels)
        tokens = pixels.unflatten(0, (-1, SIDE * SIDE)).flatten(1, 2).transpose(0, 1)  # [H W F, B, C]
        tokens = tokens + self.last(tokens)
        h = tokens.transpose(0, 1).unflatten(1, (SIDE, SIDE, frames)).permute(0, 3, 4, 1, 2)
        return (
            self.leave(h.flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2) * timestep[:, None, None, None, None]
        )
