"""Pieces of denoisers that keep the shape of their input: what forwards are made of, in the ways people write them.

Each takes a map [N, C, H, W] and gives one; all numbers it is made with are drawn from one generator.
"""

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional


class Padded(nn.Module):
    """A convolution with padding of some kind, groups and dilation."""

    def __init__(self, channels: int, draw: Random) -> None:
        super().__init__()
        kernel, dilation = draw.choice([1, 3, 3, 5]), draw.choice([1, 1, 2])
        self.conv = nn.Conv2d(
            channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation,
            groups=draw.choice([1, 1, 2, channels]), bias=draw.random() < 0.7,
            padding_mode=draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class RootMeanSquare(nn.Module):
    """RMSNorm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain[:, None, None]
        return y


class LastChannels(nn.Module):
    """LayerNorm with channels last, there and back."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class Resampled(nn.Module):
    """Half the size, a convolution, and the size again."""

    def __init__(self, channels: int, draw: Random) -> None:
        super().__init__()
        self.down = draw.choice([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Conv2d(channels, channels, 3, 2, 1)])
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.mode, self.way = draw.choice(["nearest", "bilinear", "bicubic"]), draw.choice(["size", "factor", "up"])
        self.up = nn.ConvTranspose2d(channels, channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = functional.silu(self.middle(self.down(x)))
        if self.way == "up":
            y: Tensor = self.up(half)
            return y
        corners = None if self.mode == "nearest" else False
        if self.way == "size":
            return functional.interpolate(half, size=x.shape[-2:], mode=self.mode, align_corners=corners)
        return functional.interpolate(half, scale_factor=2.0, mode=self.mode, align_corners=corners)


class Attended(nn.Module):
    """Attention over positions: heads, masks, norms of queries and keys, written in several ways."""

    def __init__(self, channels: int, draw: Random) -> None:
        super().__init__()
        self.heads = draw.choice([1, 2])
        self.shared = self.heads == 2 and draw.random() < 0.3  # one key and value for both heads
        width = channels // self.heads if self.shared else channels
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * width, bias=draw.random() < 0.5)
        self.out = nn.Linear(channels, channels)
        self.way, self.mask = draw.choice(["fused", "explicit", "einsum"]), draw.choice(["none", "causal", "added"])
        self.normed = draw.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q = self.q(tokens).view(n, h * w, self.heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).view(n, h * w, -1, 2, c // self.heads).unbind(3)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.shared:
            k, v = k.expand(n, self.heads, -1, -1), v.expand(n, self.heads, -1, -1)
        if self.normed:
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        y = self.out(self._attend(q, k, v).transpose(1, 2).reshape(n, h * w, c))
        return y.transpose(1, 2).reshape(n, c, h, w)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        mask = None
        if self.mask == "causal":
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        elif self.mask == "added":
            mask = -0.1 * (torch.arange(length)[:, None] - torch.arange(length)).abs().float()
        if self.way == "fused":
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.way == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v


class Viewed(nn.Module):
    """Another view of the positions, something linear there, and back."""

    def __init__(self, channels: int, draw: Random) -> None:
        super().__init__()
        self.way = draw.choice(["shuffle", "patches", "roll", "split", "stack", "where", "flip"])
        self.mix = nn.Conv2d(4 * channels if self.way == "shuffle" else channels, channels * 4, 1)
        self.linear = nn.Linear(4 * channels, 4 * channels)
        self.plain = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.way == "shuffle":
            return functional.pixel_shuffle(self.mix(functional.pixel_unshuffle(x, 2)), 2)
        if self.way == "patches":
            cut = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 4 * c)
            joined = self.linear(cut).view(n, h // 2, w // 2, 2, 2, c)
            return torch.einsum("nhwpqc->nchpwq", joined).reshape(n, c, h, w)
        if self.way == "roll":
            return torch.roll(self.plain(torch.roll(x, (1, -1), (2, 3))), (-1, 1), (2, 3))
        if self.way == "split":
            first, second = x.chunk(2, dim=1)
            return torch.cat([second * torch.sigmoid(first), first], 1)
        if self.way == "stack":
            return torch.stack([x, self.plain(x)], 1).mean(1)
        if self.way == "where":
            return torch.where(x > 0, self.plain(x), torch.zeros_like(x))
        return self.plain(x.flip(-1))[..., list(range(w - 1, -1, -1))]


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"), nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.Mish, nn.Tanh, nn.ELU,
    nn.Softplus, nn.Hardswish, nn.PReLU, nn.Sigmoid, nn.ReLU6,
)  # fmt: skip


def norm(channels: int, draw: Random) -> nn.Module:
    """Of some kind, in evaluation mode."""
    made: nn.Module = draw.choice(
        [
            lambda: nn.GroupNorm(2, channels),
            lambda: nn.GroupNorm(1, channels, affine=False),
            lambda: nn.BatchNorm2d(channels),
            lambda: nn.InstanceNorm2d(channels, affine=draw.random() < 0.5),
            lambda: RootMeanSquare(channels),
            lambda: LastChannels(channels, draw.random() < 0.5),
            nn.Identity,
        ]
    )()
    return made


def piece(channels: int, draw: Random) -> nn.Module:
    """Of some kind, behind a norm and an activation of some kind."""
    kind = draw.choice([Padded, Padded, Resampled, Attended, Viewed])
    return nn.Sequential(norm(channels, draw), draw.choice(ACTIVATIONS)(), kind(channels, draw))
