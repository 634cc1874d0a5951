"""The original DDPM U-Net as its PyTorch checkpoints name it: the reference that a converted one is compared with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sine_first(t: Tensor, width: int) -> Tensor:
    """Embedding of timesteps, sines in front, one frequency less in the exponent, [N, width]."""
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    return torch.cat([angles.sin(), angles.cos()], 1)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(time, outputs)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (each(h).flatten(2) for each in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, -1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class Resize(nn.Module):
    """A convolution in front of which, or with which, the size changes."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, with attention behind each or none."""

    def __init__(self, inputs: Sequence[int], outputs: int, time: int, *, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(each, outputs, time) for each in inputs)
        self.attn = nn.ModuleList(Attention(outputs) for _ in inputs if attends)


class PixelUNet(nn.Module):
    """``channels * multiples`` per level; attends where a level is 16 x 16."""

    def __init__(self, multiples: Sequence[int] = (1, 2, 2), *, channels: int = 32, layers: int = 1, size: int = 32):
        super().__init__()
        self.width, time, widths = channels, 4 * channels, [channels * each for each in multiples]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(channels, time), nn.Linear(time, time)])
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        attends = [size >> level == 16 for level in range(len(widths))]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = channels, [channels]
        for level, width in enumerate(widths):
            made = Level([current, *[width] * (layers - 1)], width, time, attends=attends[level])
            current = width
            skips += [width] * layers
            if level < len(widths) - 1:
                made.downsample = Resize(width, down=True)
                skips.append(width)
            self.down.append(made)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            Block(current, current, time),
            Attention(current),
            Block(current, current, time),
        )
        for level in reversed(range(len(widths))):
            width = widths[level]
            inputs = [current + skips.pop(), *(width + skips.pop() for _ in range(layers))]
            made, current = Level(inputs, width, time, attends=attends[level]), width
            if level:
                made.upsample = Resize(width, down=False)
            self.up.insert(0, made)
        self.norm_out, self.conv_out = norm(current), nn.Conv2d(current, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.temb.dense[1](F.silu(self.temb.dense[0](sine_first(t, self.width))))
        skips = [self.conv_in(x)]
        for level in self.down:
            for index, block in enumerate(level.block):
                h = block(skips[-1], time)
                skips.append(level.attn[index](h) if level.attn else h)
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], time)), time)
        for level in reversed(self.up):
            for index, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], 1), time)
                h = level.attn[index](h) if level.attn else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
