"""Trajectories: diffusion policies (Chi et al. 2023) and a planner (Janner et al. 2022)."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, UNet1DModel
from torch import Tensor, nn

from .layers import sinusoids

ACTIONS, HORIZON = 2, 16
OBSERVATIONS, SEEN = 5, 2
"""Values of one observation, and how many the policy sees."""
STEPS = (99, 66, 33, 0)
"""Of 100 timesteps."""


def kept_signal() -> Tensor:
    """The cosine schedule's share of the signal after each of 100 timesteps."""
    ends = torch.cos((torch.linspace(0, 1, 101) + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - (1 - ends[1:] / ends[:-1]).clamp(max=0.999)).cumprod(0)


class ConvolutionBlock(nn.Sequential):
    """Convolution over time, norm, Mish."""

    def __init__(self, width_in: int, width: int, kernel: int = 5) -> None:
        super().__init__(nn.Conv1d(width_in, width, kernel, padding=kernel // 2), nn.GroupNorm(8, width), nn.Mish())


class FilmBlock(nn.Module):
    """Two convolutions; the condition scales and shifts every channel between them."""

    def __init__(self, width_in: int, width: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = ConvolutionBlock(width_in, width), ConvolutionBlock(width, width)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * width), nn.Unflatten(-1, (2, width, 1)))
        self.shortcut = nn.Conv1d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        film = self.film(condition)
        return self.second(film[:, 0] * self.first(x) + film[:, 1]) + self.shortcut(x)


class ConditionalUnet1d(nn.Module):
    """A U-Net over time: [N, T, actions] to the same; observations come flat, [N, seen * values]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        condition = 32 + SEEN * OBSERVATIONS
        self.time = nn.Sequential(nn.Linear(32, 128), nn.Mish(), nn.Linear(128, 32))
        self.down = nn.ModuleList([FilmBlock(ACTIONS, width, condition), FilmBlock(width, width, condition)])
        self.shrink = nn.Conv1d(width, width, 3, 2, 1)
        self.middle = nn.ModuleList([FilmBlock(width, 2 * width, condition), FilmBlock(2 * width, width, condition)])
        self.grow = nn.ConvTranspose1d(width, width, 4, 2, 1)
        self.up = nn.ModuleList([FilmBlock(2 * width, width, condition), FilmBlock(width, width, condition)])
        self.last = nn.Sequential(ConvolutionBlock(width, width), nn.Conv1d(width, ACTIONS, 1))

    def forward(self, sample: Tensor, timestep: Tensor | int, global_cond: Tensor) -> Tensor:
        timesteps = torch.as_tensor(timestep).reshape(-1).expand(sample.shape[0])
        condition = torch.cat([self.time(sinusoids(timesteps, 32)), global_cond], -1)
        x = sample.moveaxis(-1, -2)
        for block in self.down:
            x = block(x, condition)
        skip, x = x, self.shrink(x)
        for block in self.middle:
            x = block(x, condition)
        x = torch.cat([self.grow(x), skip], 1)
        for block in self.up:
            x = block(x, condition)
        return self.last(x).moveaxis(-1, -2)


def policy_unet() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Ancestral sampling of actions; the timestep is a plain integer and predictions of the start are clipped."""
    torch.manual_seed(0)
    net = ConditionalUnet1d().eval().requires_grad_(False)
    kept = kept_signal()

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        seen = torch.rand(1, SEEN * OBSERVATIONS, generator=random) * 2 - 1
        x = torch.randn(1, HORIZON, ACTIONS, generator=random)
        for t, after in zip(STEPS, (*STEPS[1:], None), strict=True):
            here, there = kept[t], torch.tensor(1.0) if after is None else kept[after]
            clean = ((x - (1 - here).sqrt() * net(x, t, global_cond=seen)) / here.sqrt()).clamp(-1, 1)
            beta = 1 - here / there
            x = (there.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - there) * x) / (1 - here)
            x = x + (beta * (1 - there) / (1 - here)).sqrt() * torch.randn(x.shape, generator=random)
        return x

    return net, draw


class PolicyTransformer(nn.Module):
    """A decoder over actions that reads timestep and observations as tokens and sees no later action."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.action, self.observation = nn.Linear(ACTIONS, width), nn.Linear(OBSERVATIONS, width)
        self.width = width
        self.position = nn.Parameter(0.02 * torch.randn(1, HORIZON, width))
        self.memory_position = nn.Parameter(0.02 * torch.randn(1, 1 + SEEN, width))
        self.encode = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decode = nn.TransformerDecoder(layer, 2)
        mask = torch.full((HORIZON, HORIZON), float("-inf")).triu(1)
        self.register_buffer("mask", mask)
        # An action reads the timestep and the observations up to its own time.
        later = torch.arange(1 + SEEN)[None] - 1 > torch.arange(HORIZON)[:, None]
        self.register_buffer("memory_mask", torch.zeros(HORIZON, 1 + SEEN).masked_fill(later, float("-inf")))
        self.norm, self.predict = nn.LayerNorm(width), nn.Linear(width, ACTIONS)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        time = sinusoids(timestep.expand(sample.shape[0]), self.width)[:, None]
        memory = self.encode(torch.cat([time, self.observation(cond)], 1) + self.memory_position)
        tokens = self.action(sample) + self.position
        return self.predict(self.norm(self.decode(tokens, memory, self.mask, self.memory_mask)))


def policy_transformer() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Deterministic sampling of actions, clipped to -1..1; the timestep is a tensor without axes."""
    torch.manual_seed(0)
    net = PolicyTransformer().eval().requires_grad_(False)
    kept = kept_signal()

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        seen = torch.rand(1, SEEN, OBSERVATIONS, generator=random) * 2 - 1
        x = torch.randn(1, HORIZON, ACTIONS, generator=random)
        for t, after in zip(STEPS, (*STEPS[1:], None), strict=True):
            here, there = kept[t], torch.tensor(1.0) if after is None else kept[after]
            clean = ((x - (1 - here).sqrt() * net(x, torch.tensor(t), seen)) / here.sqrt()).clamp(-1, 1)
            noise = (x - here.sqrt() * clean) / (1 - here).sqrt()
            x = there.sqrt() * clean + (1 - there).sqrt() * noise
        return x

    return net, draw


def planner() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """``UNet1DModel`` as the published planners of diffusers have it, in a loop of one's own.

    The state at the start is written into the trajectory after every step. [N, actions + states, T].
    """
    torch.manual_seed(0)
    net = UNet1DModel(
        in_channels=ACTIONS + OBSERVATIONS,
        out_channels=ACTIONS + OBSERVATIONS,
        block_out_channels=(32, 64),
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        act_fn="mish",
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1.0,
        layers_per_block=1,
    )
    net = net.eval().requires_grad_(False)
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="sample")

    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        state = torch.rand(OBSERVATIONS, generator=random)
        x = torch.randn(1, ACTIONS + OBSERVATIONS, HORIZON, generator=random)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x[:, ACTIONS:, 0] = state
            x = scheduler.step(net(x, t.expand(1)).sample, t, x, generator=random).prev_sample
        x[:, ACTIONS:, 0] = state
        return x

    return net, draw
