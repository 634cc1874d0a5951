"""Transformers over patches: U-ViT (Bao et al. 2022), DiT (Peebles and Xie 2022), HDiT (Crowson et al. 2024)."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import FourierFeatures, Mlp, TokenAttention, patches, sinusoids, unpatched

CLASSES = 10
WIDTH = 64
SIDE = 8
"""Of the sample: latents of four channels."""
PATCH = 2


class UVitBlock(nn.Module):
    """A block of a vision transformer; with ``skip`` it first joins what a block before the middle left."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.norm1, self.attention = nn.LayerNorm(WIDTH), TokenAttention(WIDTH)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp(WIDTH)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, skip], -1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UVit(nn.Module):
    """Timestep and class are tokens like the patches, and long skips join the two halves."""

    def __init__(self) -> None:
        super().__init__()
        tokens = (SIDE // PATCH) ** 2
        self.embed = nn.Conv2d(4, WIDTH, PATCH, stride=PATCH)
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(1, 2 + tokens, WIDTH))
        self.before = nn.ModuleList([UVitBlock(), UVitBlock()])
        self.middle = UVitBlock()
        self.after = nn.ModuleList([UVitBlock(skip=True), UVitBlock(skip=True)])
        self.norm, self.predict = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * PATCH**2)
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        time, label = sinusoids(timesteps, WIDTH)[:, None], self.label(y)[:, None]
        tokens = torch.cat([label, time, tokens], 1) + self.position
        skips = []
        for block in self.before:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.middle(tokens)
        for block in self.after:
            tokens = block(tokens, skips.pop())
        tokens = self.predict(self.norm(tokens))[:, 2:]
        return self.smooth(unpatched(tokens, PATCH, SIDE // PATCH))


def u_vit() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Guided with a class beyond the last, in one call of two rows; timesteps are times in 0..1 times 999."""
    torch.manual_seed(0)
    net = UVit().eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        labels = torch.tensor([seed % CLASSES, CLASSES])
        kept = torch.cos(torch.linspace(0.9, 0.0, 5) * torch.pi / 2) ** 2  # [steps + 1]
        for step, (here, there) in enumerate(itertools.pairwise(kept)):
            time = torch.full((2,), 0.9 - 0.9 * step / 4) * 999
            noise, empty = net(torch.cat([x, x]), time, labels).chunk(2)
            noise = noise + 0.4 * (noise - empty)
            x = there.sqrt() * (x - (1 - here).sqrt() * noise) / here.sqrt() + (1 - there).sqrt() * noise
        return x

    return net, draw


class DitBlock(nn.Module):
    """Norms without weights of their own, scaled, shifted and gated by the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attention, self.mlp = TokenAttention(WIDTH), Mlp(WIDTH)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Dit(nn.Module):
    """Predicts the noise and, in as many further channels, where its variance lies: [N, 8, 8, 8] of [N, 4, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * PATCH**2, WIDTH)
        grid = torch.arange(SIDE // PATCH)
        rows, columns = grid.repeat_interleave(SIDE // PATCH), grid.repeat(SIDE // PATCH)
        position = torch.cat([sinusoids(columns, WIDTH // 2), sinusoids(rows, WIDTH // 2)], 1)
        self.register_buffer("position", position[None])
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList([DitBlock(), DitBlock()])
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.predict = nn.Linear(WIDTH, 8 * PATCH**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.embed(patches(x, PATCH)) + self.position
        c = self.time(sinusoids(t, WIDTH)) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulate(c)[:, None].chunk(2, -1)
        return unpatched(self.predict(self.norm(tokens) * (1 + scale) + shift), PATCH, SIDE // PATCH)


def dit() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Ancestral sampling with the learned variance, guided in one call of two rows, on 4 of 1000 timesteps."""
    torch.manual_seed(0)
    net = Dit().eval().requires_grad_(False)
    cumulative = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        x, steps = torch.randn(1, 4, SIDE, SIDE, generator=random), [999, 666, 333, 0]
        for step, t in enumerate(steps):
            there = cumulative[steps[step + 1]] if t else torch.tensor(1.0)
            both = net(torch.cat([x, x]), torch.full((2,), t), torch.tensor([seed % CLASSES, CLASSES]))
            noise, empty = both[:, :4].chunk(2)
            mean, spread = posterior(x, empty + 4 * (noise - empty), both[:1, 4:], (cumulative[t], there))
            x = mean + spread * torch.randn(x.shape, generator=random) if t else mean
        return x

    return net, draw


def posterior(x: Tensor, noise: Tensor, share: Tensor, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the next sample.

    Args:
        x: The sample here.
        noise: The noise predicted in it.
        share: Where the logarithm of the variance lies, from -1 at its smallest to 1 at its largest.
        kept: The share of the signal's power here and there.
    """
    here, there = kept
    clean = ((x - (1 - here).sqrt() * noise) / here.sqrt()).clamp(-3, 3)
    beta = 1 - here / there
    mean = (there.sqrt() * beta * clean + (here / there).sqrt() * (1 - there) * x) / (1 - here)
    low, high = (beta * (1 - there) / (1 - here)).clamp(min=1e-20).log(), beta.log()
    return mean, (0.5 * torch.lerp(low, high, (share + 1) / 2)).exp()


class AdaptiveRmsNorm(nn.Module):
    """RMS norm over the last axis, scaled by the embedding: [N, H, W, C]."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.scale = nn.Linear(condition, width, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.scale(c)[:, None, None])


class HditBlock(nn.Module):
    """Cosine-similarity attention with axial rotary positions, within windows if one is given, and a GEGLU."""

    def __init__(self, width: int, condition: int, window: int = 0, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1, self.norm2 = AdaptiveRmsNorm(width, condition), AdaptiveRmsNorm(width, condition)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 10.0))
        self.frequencies = nn.Parameter(torch.logspace(0, 1, width // heads // 4) * torch.pi, requires_grad=False)
        self.up, self.down = nn.Linear(width, 6 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x, c))
        value, gate = self.up(self.norm2(x, c)).chunk(2, -1)
        return x + self.down(value * nn.functional.gelu(gate))

    def _attend(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        size = self.window or h
        q, k, v = self.qkv(x).reshape(n, h, w, 3, self.heads, c // self.heads).unbind(3)  # [N, H, W, heads, C / heads]
        positions = torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"), -1)
        angles = (positions[..., None] * self.frequencies).flatten(-2)[:, :, None]  # [H, W, 1, C / heads / 2]
        q, k = (turned(nn.functional.normalize(value, dim=-1), angles) for value in (q, k))
        q, k, v = (windows(value, size) for value in (q, k, v))
        mixed = ((q @ k.transpose(-1, -2)) * self.temperature).softmax(-1) @ v  # [N windows, heads, size^2, C / heads]
        mixed = mixed.reshape(n, h // size, w // size, self.heads, size, size, c // self.heads)
        return self.out(mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, h, w, c))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of the last axis by ``angles``, which has half its length."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def windows(x: Tensor, size: int) -> Tensor:
    """Square windows as rows of the batch: [N, H, W, heads, D] to [N H W / size^2, heads, size^2, D]."""
    n, h, w, heads, d = x.shape
    x = x.reshape(n, h // size, size, w // size, size, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, heads, size * size, d)


class Hdit(nn.Module):
    """An hourglass over pixels: local attention outside, global attention inside, a learned mix where they meet."""

    def __init__(self) -> None:
        super().__init__()
        outer, inner = WIDTH // 2, WIDTH
        self.level = FourierFeatures(WIDTH)
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.condition = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.embed = nn.Linear(3, outer, bias=False)
        self.before, self.after = HditBlock(outer, WIDTH, window=4), HditBlock(outer, WIDTH, window=4)
        self.merge, self.split = nn.Linear(4 * outer, inner, bias=False), nn.Linear(inner, 4 * outer, bias=False)
        self.middle = nn.ModuleList([HditBlock(inner, WIDTH), HditBlock(inner, WIDTH)])
        self.share = nn.Parameter(torch.tensor(0.5))
        self.norm, self.predict = nn.RMSNorm(outer), nn.Linear(outer, 3, bias=False)

    def forward(self, x: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
        c = self.condition(self.level(sigma.log() / 4) + self.label(class_cond))
        scale = (sigma**2 + 0.25).rsqrt()[:, None, None, None]
        outside = self.before(self.embed((x * scale).permute(0, 2, 3, 1)), c)
        inside = self.merge(nn.functional.pixel_unshuffle(outside.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
        for block in self.middle:
            inside = block(inside, c)
        inside = nn.functional.pixel_shuffle(self.split(inside).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        tokens = self.after(torch.lerp(outside, inside, self.share), c)
        predicted = self.predict(self.norm(tokens)).permute(0, 3, 1, 2)
        return x * scale**2 * 0.25 + predicted * sigma[:, None, None, None] * 0.5 * scale


def hdit() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Pixels, drawn by Euler's ancestral method: the noise level is a vector, the class a keyword."""
    torch.manual_seed(0)
    net = Hdit().eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        sigmas = torch.cat([torch.logspace(1.5, -1.5, 4), torch.zeros(1)])
        x = torch.randn(1, 3, SIDE, SIDE, generator=random) * sigmas[0]
        for here, there in itertools.pairwise(sigmas):
            clean = net(x, here.expand(1), class_cond=torch.tensor([seed % CLASSES]))
            fresh = (there**2 * (here**2 - there**2) / here**2).clamp(max=there**2).sqrt()
            x = x + (x - clean) / here * ((there**2 - fresh**2).sqrt() - here)
            x = x + fresh * torch.randn(x.shape, generator=random)
        return x

    return net, draw
