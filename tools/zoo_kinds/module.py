"""A denoiser of random pieces, with its description: times, conditioning, shared weights and residuals at random."""

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export import Description
from tfmq_export.capture.denoiser import Conditioning, Denoise
from zoo_kinds.pieces import piece

CHANNELS, WIDTH = 8, 12
TIMES: Mapping[str, list[int] | list[float]] = {"whole": [900, 500, 100], "real": [0.9, 0.5, 0.1]}
LABELS, TOKENS = 3, 4


class Drawn(nn.Module):
    """A denoiser of one seed."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        self.real, self.other = draw.random() < 0.5, draw.random() < 0.15
        self.takes = draw.choice(["nothing", "nothing", "label", "prompt", "masked prompt"])
        self.time = draw.choice(["waves", "table", "numbers"] if not self.real else ["waves", "log", "numbers"])
        self.shifts = draw.choice(["add", "scale and shift", "gate"])
        self.residual, self.sizes = draw.random() < 0.7, draw.choice([(8, 8), (4, 8), (12, 4)])
        self.inputs = draw.choice([1, 3, 4])
        self.enter, self.leave = nn.Conv2d(self.inputs, CHANNELS, 3, 1, 1), nn.Conv2d(CHANNELS, self.inputs, 3, 1, 1)
        parts = [piece(CHANNELS, draw) for _ in range(draw.randint(1, 3))]
        if draw.random() < 0.3:
            parts.append(parts[0])  # the same weights again
        self.parts = nn.ModuleList(parts)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -6, WIDTH // 2)))
        self.rows = nn.Embedding(1000, WIDTH)
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2 * CHANNELS))
        self.label = nn.Embedding(LABELS, WIDTH)
        self.look, self.heard = nn.Linear(CHANNELS, CHANNELS), nn.Linear(WIDTH, 2 * CHANNELS)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        prompt: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The prediction, shaped like ``x``."""
        code = self._time(t)
        if self.other:  # a second time that follows from the first, as consistency models have it
            code = code + self._time((t * 0.5).to(t.dtype))
        if label is not None:
            code = code + self.label(label)
        shift, scale = self.embed(code)[..., None, None].chunk(2, dim=1)
        h = self.enter(x)
        for part in self.parts:
            y = part(h)
            y = y + shift if self.shifts == "add" else y * (1 + scale) + shift
            y = y * torch.sigmoid(scale) if self.shifts == "gate" else y
            h = h + y if self.residual else y
        if prompt is not None:
            h = h + self._hear(h, prompt, mask)
        out: Tensor = self.leave(functional.silu(h))
        return out

    def _time(self, t: Tensor) -> Tensor:
        if self.time == "table":
            found: Tensor = self.rows(t)
            return found
        if self.time == "numbers":  # the timestep itself is data
            return torch.stack([t / (1 if self.real else 1000)] * WIDTH, -1).float()
        angles = (t.log() if self.time == "log" else t.float() * (1000 if self.real else 1))[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    def _hear(self, h: Tensor, prompt: Tensor, mask: Tensor | None) -> Tensor:
        n, c, height, width = h.shape
        k, v = self.heard(prompt).chunk(2, -1)
        bias = None if mask is None else (1 - mask[:, None, :].to(h.dtype)) * -10000.0
        q = self.look(h.flatten(2).transpose(1, 2))
        return (
            functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).view(n, c, height, width)
        )


def drawn(seed: int) -> tuple[Drawn, Description]:
    """The denoiser of a seed, with random weights."""
    draw = Random(seed)
    torch.manual_seed(seed)
    module = Drawn(draw).eval()
    with torch.no_grad():
        for name, value in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.copy_(torch.rand_like(value) + 0.5)
    times = TIMES["real" if module.real else "whole"]
    conditioning: dict[str, Tensor] = {}
    if module.takes == "label":
        conditioning["label"] = torch.arange(LABELS)
    elif "prompt" in module.takes:
        conditioning["prompt"] = torch.randn(3, TOKENS, WIDTH)
    if module.takes == "masked prompt":
        conditioning["mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    examples = {name: value[:2].clone() for name, value in conditioning.items()}
    inputs = {"x": torch.randn(2, module.inputs, *module.sizes), "t": torch.tensor([times[0], times[-1]]), **examples}
    sampler: Any = _walk(times)
    return module, Description(
        example_inputs=inputs, sampler=sampler, timesteps=times, sample="x", timestep="t", conditioning=conditioning
    )


def _walk(times: list[int] | list[float]) -> Any:
    """A sampler that visits each timestep and moves a little."""

    def sampler(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise
        for t in times:
            x = x - denoise(x, t, **conditioning) / math.sqrt(len(times))
        return x

    return sampler
