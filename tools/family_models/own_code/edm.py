"""Networks that take a real noise level, inside a preconditioner: EDM (Karras et al. 2022) and EDM2 (2023)."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .layers import FourierFeatures, ImageAttention, sinusoids

SIGMA_DATA = 0.5
CLASSES = 10
WIDTH = 32


class Preconditioned(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4)``, so that F sees and predicts unit variance.

    Samples and levels may be float64; the network itself computes in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        total = sigma**2 + SIGMA_DATA**2
        skip, out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt()
        predicted = self.network(x / total.sqrt(), sigma.log().flatten() / 4, class_labels)
        return skip * x + out * predicted


class EdmBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding; it may change the resolution."""

    def __init__(self, width_in: int, width: int, embedding: int, resample: str = "", attention: bool = False) -> None:
        super().__init__()
        self.resample = resample
        self.norm1, self.conv1 = nn.GroupNorm(8, width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * width)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attention = ImageAttention(width) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self._resampled(nn.functional.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, 1)
        h = nn.functional.silu(torch.addcmul(shift, self.norm2(self.conv1(h)), scale + 1))
        h = self.conv2(nn.functional.dropout(h, 0.1, self.training))
        return self.attention((h + self.skip(self._resampled(x))) * 0.5**0.5)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return nn.functional.avg_pool2d(x, 2)
        if self.resample == "up":
            return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class EdmNetwork(nn.Module):
    """A U-Net of two resolutions with an embedding of level and class, a one-hot vector."""

    def __init__(self) -> None:
        super().__init__()
        e = 4 * WIDTH
        self.level = nn.Sequential(nn.Linear(WIDTH, e), nn.SiLU(), nn.Linear(e, e))
        self.label = nn.Linear(CLASSES, WIDTH, bias=False)
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.down = nn.ModuleList(
            [EdmBlock(WIDTH, WIDTH, e), EdmBlock(WIDTH, WIDTH, e, "down"), EdmBlock(WIDTH, 2 * WIDTH, e, "", True)]
        )
        self.middle = nn.ModuleList([EdmBlock(2 * WIDTH, 2 * WIDTH, e, "", True), EdmBlock(2 * WIDTH, 2 * WIDTH, e)])
        self.up = nn.ModuleList(
            [
                EdmBlock(4 * WIDTH, 2 * WIDTH, e, "", True),
                EdmBlock(3 * WIDTH, 2 * WIDTH, e, "up"),
                EdmBlock(3 * WIDTH, WIDTH, e),
                EdmBlock(2 * WIDTH, WIDTH, e),
            ]
        )
        self.last = nn.Sequential(nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor | None) -> Tensor:
        embedding = sinusoids(level, WIDTH, longest=10_000)
        embedding = embedding.reshape(embedding.shape[0], 2, -1).flip(1).reshape(*embedding.shape)  # sines first
        if class_labels is not None:
            embedding = embedding + self.label(class_labels * np.sqrt(CLASSES))
        embedding = nn.functional.silu(self.level(embedding))
        x = self.first(x)
        skips = [x]
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.last(x)


def noise_levels(steps: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0) -> Tensor:
    """Karras' levels from the largest to zero, float64, [steps + 1]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def edm() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Class-conditional, drawn by Heun's method in float64: one call in the last step, two in every other."""
    torch.manual_seed(0)
    net = Preconditioned(EdmNetwork()).eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        levels = noise_levels(4)
        labels = torch.eye(CLASSES)[[seed % CLASSES]]
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(torch.float64) * levels[0]
        for here, there in itertools.pairwise(levels):
            slope = (x - net(x, here, labels).to(torch.float64)) / here
            ahead = x + (there - here) * slope
            if there > 0:
                slope = (slope + (ahead - net(ahead, there, labels).to(torch.float64)) / there) / 2
            x = x + (there - here) * slope
        return x

    return net, draw


def normalized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Vectors over ``dims`` at a mean square of one."""
    return x / (x.square().mean(dims, keepdim=True).sqrt() + 1e-4)


def mixed(a: Tensor, b: Tensor, share: float = 0.3) -> Tensor:
    """A sum that keeps the magnitude of two independent values."""
    return torch.lerp(a, b, share) / np.sqrt((1 - share) ** 2 + share**2)


def magnitude_silu(x: Tensor) -> Tensor:
    """SiLU at unit variance of its result."""
    return nn.functional.silu(x) / 0.596


class UnitLayer(nn.Module):
    """A convolution or linear layer without bias whose weight vectors are normalized at every call."""

    def __init__(self, width_in: int, width: int, kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width_in, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.ndim))
        weight = normalized(self.weight, dims) * (gain / np.sqrt(self.weight[0].numel()))
        if self.weight.ndim == 2:
            return x @ weight.t()
        return nn.functional.conv2d(x, weight, padding=self.weight.shape[-1] // 2)


class Edm2Block(nn.Module):
    """A residual block without norms: every layer keeps the magnitude of what it reads.

    On the way down the shortcut comes first and its pixels are normalized; on the way up it comes last.
    """

    def __init__(self, width_in: int, width: int, embedding: int, resample: str = "", up: bool = False) -> None:
        super().__init__()
        self.resample, self.up = resample, up
        self.gain = nn.Parameter(torch.full((), 0.5))
        self.skip = UnitLayer(width_in, width, (1, 1))
        self.conv1 = UnitLayer(width_in if up else width, width, (3, 3))
        self.conv2 = UnitLayer(width, width, (3, 3))
        self.embed = UnitLayer(embedding, width)
        self.attends = bool(resample)
        if self.attends:
            self.qkv, self.out = UnitLayer(width, 3 * width, (1, 1)), UnitLayer(width, width, (1, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.resample == "down":
            x = nn.functional.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.up:
            x = normalized(self.skip(x), (1,))
        h = self.conv1(magnitude_silu(x))
        h = magnitude_silu(h * (self.embed(embedding, self.gain) + 1)[:, :, None, None])
        x = mixed(self.skip(x) if self.up else x, self.conv2(h))
        if self.attends:
            n, c, height, width = x.shape
            q, k, v = normalized(self.qkv(x).reshape(n, 2, c // 2, 3, height * width), (2,)).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(c // 2)).softmax(3)
            x = mixed(x, self.out(torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, height, width)))
        return x.clip(-256, 256)


class Edm2Network(nn.Module):
    """A magnitude-preserving U-Net; a channel of ones takes the place of every bias."""

    def __init__(self) -> None:
        super().__init__()
        e = 4 * WIDTH
        self.features, self.level = FourierFeatures(WIDTH), UnitLayer(WIDTH, e)
        self.label = UnitLayer(CLASSES, e)
        self.first = UnitLayer(4 + 1, WIDTH, (3, 3))
        self.down = nn.ModuleList([Edm2Block(WIDTH, WIDTH, e), Edm2Block(WIDTH, 2 * WIDTH, e, "down")])
        self.up = nn.ModuleList([Edm2Block(4 * WIDTH, WIDTH, e, "up", True), Edm2Block(2 * WIDTH, WIDTH, e, up=True)])
        self.last = UnitLayer(WIDTH, 4, (3, 3))
        self.gain = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor | None) -> Tensor:
        embedding = self.level(self.features(level) * np.sqrt(2))
        if class_labels is not None:
            embedding = mixed(embedding, self.label(class_labels * np.sqrt(CLASSES)), 0.5)
        embedding = magnitude_silu(embedding)
        x = self.first(torch.cat([x, torch.ones_like(x[:, :1])], 1))
        skips = []
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.last(x, self.gain)


def edm2() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Latents of four channels, drawn by Euler's method and guided: one call with the class and one without it."""
    torch.manual_seed(0)
    net = Preconditioned(Edm2Network()).eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        levels = noise_levels(4)
        labels = torch.eye(CLASSES)[[seed % CLASSES]]
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * levels[0]
        for here, there in itertools.pairwise(levels):
            with_class, without = net(x, here, labels), net(x, here)
            x = x + (there - here) * (x - without.lerp(with_class, 1.5)) / here
        return x

    return net, draw
