"""Networks of a few lines: a rectified flow of points (Liu et al. 2022), and a call with a dictionary of conditions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import ImageAttention, sinusoids


class PointFlow(nn.Module):
    """The velocity of points in the plane at a time in 0..1: [N, 2] and [N, 1] to [N, 2]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.cat([x, t], 1)))
        return self.last(torch.tanh(self.second(h)))


def point_flow() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """64 points carried from noise at time 0 to data at time 1 by Euler's method."""
    torch.manual_seed(0)
    net = PointFlow().eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(seed))
        steps = 4
        for step in range(steps):
            t = torch.full((x.shape[0], 1), step / steps)
            x = x + net(x, t) / steps
        return x

    return net, draw


class Conditioned(nn.Module):
    """Convolutions that read a dictionary: tokens of a text with their mask, a style and a small picture.

    Called with keywords alone: ``model(x=..., t=..., cond={"text", "mask", "style", "hint"})``; returns a dictionary.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.hint = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(3, width, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.style = nn.Embedding(4, width)
        self.attend = nn.MultiheadAttention(width, 2, kdim=16, vdim=16, batch_first=True)
        self.norm, self.middle = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.attention = ImageAttention(width)
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, *, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        level = self.time(sinusoids(1000 * t, 32)) + self.style(cond["style"])
        h = self.first(x) + self.hint(cond["hint"]) + level[:, :, None, None]
        h = h + self.middle(nn.functional.silu(self.norm(h)))
        pixels = h.flatten(2).transpose(1, 2)  # [N, H W, C]
        read, _ = self.attend(pixels, cond["text"], cond["text"], key_padding_mask=~cond["mask"], need_weights=False)
        h = self.attention(h + read.transpose(1, 2).reshape(h.shape))
        return {"velocity": self.last(h)}


def keywords() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A flow from time 1 to 0, guided in two calls of one row: the text against a zero text of the same length."""
    torch.manual_seed(0)
    net = Conditioned().eval().requires_grad_(False)

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        text, hint = torch.randn(1, 6, 16, generator=random), torch.randn(1, 3, 16, 16, generator=random)
        cond = {"text": text, "mask": torch.arange(6)[None] < 4, "style": torch.tensor([seed % 4]), "hint": hint}
        x = torch.randn(1, 4, 8, 8, generator=random)
        for t in torch.linspace(1, 0.25, 4):
            velocity = net(x=x, t=t[None], cond=cond)["velocity"]
            empty = net(x=x, t=t[None], cond={**cond, "text": torch.zeros_like(text)})["velocity"]
            x = x - 0.25 * (empty + 3 * (velocity - empty))
        return x

    return net, draw
