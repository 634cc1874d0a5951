"""The U-Net of latent diffusion as its checkpoints name it: the reference that a converted one is compared with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cosine_first(t: Tensor, width: int) -> Tensor:
    """Embedding of timesteps, cosines in front, [N, width]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Residual(nn.Module):
    """A residual block; ``change`` is "up", "down" or nothing, ``shift`` scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, time: int, *, shift: bool = False, change: str = "") -> None:
        super().__init__()
        self.shift, self.change = shift, change
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * outputs if shift else outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.change == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.change == "up" else x

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        x = self.resized(x)
        added = self.emb_layers(time)[:, :, None, None]
        if self.shift:
            scale, shift = added.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](h))
        return self.skip_connection(x) + self.out_layers(h + added)


class SelfAttention(nn.Module):
    """Attention over positions; queries, keys and values of a head lie side by side."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        n, c, *_ = x.shape
        qkv = self.qkv(self.norm(x.flatten(2))).reshape(n * self.heads, 3 * c // self.heads, -1)
        q, k, v = qkv.chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(c // self.heads), -1)
        h = (v @ weights.transpose(1, 2)).reshape(n, c, -1)
        return x + self.proj_out(h).reshape(x.shape)


class Cross(nn.Module):
    """Attention of tokens to a context, or to themselves."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in "kv")
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """GEGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class Feed(nn.Module):
    """Feed-forward layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layer(nn.Module):
    """A transformer layer."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Cross(width, width, heads), Cross(width, context, heads)
        self.ff = Feed(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A spatial transformer; ``linear`` projections (Stable Diffusion 2) or convolutions of width 1."""

    def __init__(self, channels: int, context: int, heads: int, depth: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        made = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in, self.proj_out = made(channels, channels), made(channels, channels)
        self.transformer_blocks = nn.ModuleList(Layer(channels, context, heads) for _ in range(depth))

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).transpose(1, 2)) if self.linear else self.proj_in(h).flatten(2).transpose(1, 2)
        for each in self.transformer_blocks:
            h = each(h, context)
        if self.linear:
            return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    """Half the size, by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    """Twice the size, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    """The first convolution, called as blocks are."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class LatentUNet(nn.Module):
    """Levels of ``channels``, with attention where ``depths`` is above 0.

    Args:
        heads: Attention heads, the same everywhere; None where ``head_channels`` says their width.
        context: Width of what transformers attend to; None has plain self-attention.
    """

    def __init__(  # noqa: PLR0913
        self,
        channels: Sequence[int] = (32, 64),
        depths: Sequence[int] = (0, 1),
        *,
        layers: int = 1,
        samples: tuple[int, int] = (3, 3),
        context: int | None = None,
        heads: int | None = None,
        head_channels: int | None = None,
        linear: bool = False,
        shift: bool = False,
        resnet_samplers: bool = False,
        added: int | None = None,
    ) -> None:
        super().__init__()
        self.width, time = channels[0], 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(self.width, time), nn.SiLU(), nn.Linear(time, time))
        if added:
            self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(added, time), nn.SiLU(), nn.Linear(time, time)))

        def attention(width: int, depth: int) -> nn.Module:
            count = heads or width // head_channels
            return Transformer(width, context, count, depth, linear=linear) if context else SelfAttention(width, count)

        def residual(inputs: int, outputs: int, change: str = "") -> Residual:
            return Residual(inputs, outputs, time, shift=shift, change=change)

        current, skips = channels[0], [channels[0]]
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(samples[0], current, 3, padding=1)])])
        for level, width in enumerate(channels):
            for _ in range(layers):
                block = [residual(current, width), *([attention(width, depths[level])] if depths[level] else [])]
                self.input_blocks.append(nn.ModuleList(block))
                current = width
                skips.append(current)
            if level < len(channels) - 1:
                change = residual(current, current, "down") if resnet_samplers else Down(current)
                self.input_blocks.append(nn.ModuleList([change]))
                skips.append(current)
        middle = attention(current, depths[-1] or 1)
        self.middle_block = nn.ModuleList([residual(current, current), middle, residual(current, current)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            for layer in range(layers + 1):
                block = [residual(current + skips.pop(), width)]
                current = width
                block += [attention(width, depths[level])] if depths[level] else []
                if level and layer == layers:
                    block.append(residual(current, current, "up") if resnet_samplers else Up(current))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, current), nn.SiLU(), nn.Conv2d(current, samples[1], 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        time = self.time_embed(cosine_first(t, self.width))
        if vector is not None:
            time = time + self.label_emb(vector)
        skips = []
        for block in self.input_blocks:
            for each in block:
                x = each(x, time, context)
            skips.append(x)
        for each in self.middle_block:
            x = each(x, time, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            for each in block:
                x = each(x, time, context)
        return self.out(x)
