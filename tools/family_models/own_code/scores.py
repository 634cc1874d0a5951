"""A score network that divides by its noise level, after NCSN++ (Song et al. 2020, variance exploding)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import FourierFeatures, ImageAttention

WIDTH = 32
TAPS = (1.0, 3.0, 3.0, 1.0)


class Smooth(nn.Module):
    """Change the resolution by two with a binomial filter, as one grouped convolution with constant weights."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up, self.width = up, width
        taps = torch.tensor(TAPS)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2 * (4 if up else 1)
        self.register_buffer("kernel", kernel.expand(width, 1, 4, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return nn.functional.conv_transpose2d(x, self.kernel, stride=2, padding=1, groups=self.width)
        return nn.functional.conv2d(x, self.kernel, stride=2, padding=1, groups=self.width)


class ScoreBlock(nn.Module):
    """A residual block as BigGAN's: both branches are resampled, and their sum is divided by the root of two."""

    def __init__(self, width_in: int, width: int, resample: str = "") -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.level = nn.Linear(4 * WIDTH, width)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1)
        self.resample = Smooth(width_in, resample == "up") if resample else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.resample(nn.functional.silu(self.norm1(x)))
        h = self.conv1(h) + self.level(nn.functional.silu(level))[:, :, None, None]
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return (h + self.shortcut(self.resample(x))) / 2**0.5


class ScoreNetwork(nn.Module):
    """A U-Net beside a pyramid: the smoothed input joins on the way down, an image grows on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FourierFeatures(WIDTH, scale=16.0)
        self.level = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.down = nn.ModuleList([ScoreBlock(WIDTH, WIDTH), ScoreBlock(WIDTH, WIDTH, "down")])
        self.small, self.join = Smooth(3, up=False), nn.Conv2d(3, WIDTH, 1)
        self.middle = nn.ModuleList([ScoreBlock(WIDTH, 2 * WIDTH), ScoreBlock(2 * WIDTH, 2 * WIDTH)])
        self.attention = ImageAttention(2 * WIDTH)
        self.up = nn.ModuleList([ScoreBlock(3 * WIDTH, 2 * WIDTH, "up"), ScoreBlock(3 * WIDTH, WIDTH)])
        self.grown, self.inner = Smooth(3, up=True), nn.Conv2d(2 * WIDTH, 3, 3, padding=1)
        self.outer = nn.Sequential(nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, x: Tensor, sigmas: Tensor) -> Tensor:
        level = self.level(self.features(sigmas.log()))
        first = self.down[0](self.first(x), level)
        second = (self.down[1](first, level) + self.join(self.small(x))) / 2**0.5
        h = self.middle[1](self.attention(self.middle[0](second, level)), level)
        image = self.grown(self.inner(h))
        h = self.up[0](torch.cat([h, second], 1), level)
        h = self.up[1](torch.cat([h, first], 1), level)
        return (image + self.outer(h)) / sigmas[:, None, None, None]


def ncsnpp() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Predictor and corrector: two calls at each level, the second with noise of its own."""
    torch.manual_seed(0)
    net = ScoreNetwork().eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        sigmas = torch.logspace(1.7, -2.0, 4)
        x = torch.randn(1, 3, 8, 8, generator=random) * sigmas[0]
        for here, there in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], strict=True):
            gone, noise = here**2 - there**2, torch.randn(x.shape, generator=random)
            x = x + gone * net(x, here.expand(1)) + (there / here * gone.sqrt()) * noise
            score, noise = net(x, here.expand(1)), torch.randn(x.shape, generator=random)
            size = 2 * (0.16 * noise.norm() / score.norm()) ** 2
            x = x + size * score + (2 * size).sqrt() * noise
        return x

    return net, draw
