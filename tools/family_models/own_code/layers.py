"""Layers that several of the hand-written networks are made of."""

import math

import torch
from torch import Tensor, nn


def sinusoids(position: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Cosines and sines of real positions at geometrically spaced frequencies: [N] to [N, width]."""
    frequencies = torch.exp(-math.log(longest) * torch.arange(width // 2, device=position.device) / (width // 2))
    angles = position.float()[:, None] * frequencies  # [N, width / 2]
    return torch.cat([angles.cos(), angles.sin()], 1)


class FourierFeatures(nn.Module):
    """Cosines and sines at random frequencies, which are part of the model: [N] to [N, width]."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, position: Tensor) -> Tensor:
        angles = 2 * math.pi * position.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


class ImageAttention(nn.Module):
    """Self-attention over the positions of a map, with a residual: [N, C, H, W] to the same."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, self.heads, 3, c // self.heads, h * w)
        q, k, v = qkv.unbind(2)  # [N, heads, C / heads, H W]
        weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(c // self.heads), -1)
        mixed = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, h, w)
        return x + self.out(mixed)


class TokenAttention(nn.Module):
    """Self-attention over tokens, from one fused projection: [N, T, C] to the same."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # [N, heads, T, C / heads]
        return self.out(mixed.transpose(1, 2).reshape(n, t, c))


class Mlp(nn.Sequential):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__(
            nn.Linear(width, factor * width), nn.GELU(approximate="tanh"), nn.Linear(factor * width, width)
        )


def patches(x: Tensor, size: int) -> Tensor:
    """Cut a map into square patches: [N, C, H, W] to [N, H W / size^2, C size^2]."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, (h // size) * (w // size), c * size * size)


def unpatched(tokens: Tensor, size: int, side: int) -> Tensor:
    """Put square patches back: [N, T, C size^2] to [N, C, side size, side size]."""
    n, _, values = tokens.shape
    x = tokens.reshape(n, side, side, values // size**2, size, size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(n, values // size**2, side * size, side * size)
