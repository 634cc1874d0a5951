"""Denoisers as people write them by hand: no diffusers class, no common base, no common names.

Each ``build_*`` is a factory for ``--factory nets.handwritten:build_*``; weights are random and seeded.
"""

import functools
import math
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export import Description
from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser
from tfmq_export.capture.float_graph import float_graph
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.config import Method
from tfmq_export.models.factory import describe
from tfmq_export.passes.graph import export_model, import_graph
from tfmq_export.progress import Step
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.recipe import QuantRecipe

CLASSES = 4


class StandardisedConv(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): the weight is computed in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return functional.conv2d(x, weight / math.sqrt(weight[0].numel()), self.bias, self.stride, self.padding)


class RmsNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.gain * math.sqrt(x.shape[1])


class SinusoidalTime(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        angles = t[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class FilmBlock(nn.Module):
    """Residual block whose second norm is scaled by ``scale + 1`` and shifted, both from t."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.to_film = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out))
        self.first, self.second = (
            StandardisedConv(channels, out, 3, padding=1),
            StandardisedConv(out, out, 3, padding=1),
        )
        self.norm1, self.norm2 = nn.GroupNorm(4, out), nn.GroupNorm(4, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.to_film(time)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.norm1(self.first(x)) * (scale + 1) + shift)
        return functional.silu(self.norm2(self.second(h))) + self.skip(x)


class LinearAttention(nn.Module):
    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.norm = RmsNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * heads * size, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * size, channels, 1), RmsNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (part.reshape(b, self.heads, self.size, h * w) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        q, k = q.softmax(dim=-2) * self.size**-0.5, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, self.heads * self.size, h, w)) + x


class FilmUnet(nn.Module):
    """DDPM U-Net in the manner of lucidrains' denoising-diffusion-pytorch, with an argument that stays unused."""

    def __init__(self, dim: int = 8, channels: int = 3) -> None:
        super().__init__()
        time = 2 * dim
        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3)
        self.time_mlp = nn.Sequential(SinusoidalTime(dim), nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        self.down = FilmBlock(dim, dim, time)
        self.down_attention = LinearAttention(dim, 2, 4)
        self.shrink = nn.Conv2d(4 * dim, 2 * dim, 1)
        self.mid = FilmBlock(2 * dim, 2 * dim, time)
        self.grow = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(2 * dim, dim, 3, padding=1))
        self.up = FilmBlock(2 * dim, dim, time)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        if x_self_cond is not None:
            x = x + x_self_cond
        time = self.time_mlp(time)
        skip = self.down_attention(self.down(self.init_conv(x), time))
        b, c, h, w = skip.shape
        tiles = skip.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        h = self.grow(self.mid(self.shrink(tiles), time))
        return self.final_conv(self.up(torch.cat((h, skip), dim=1), time))


def build_film_unet() -> tuple[nn.Module, Description]:
    torch.manual_seed(0)
    timesteps = [900, 600, 300, 40]
    bar = {t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in timesteps}

    def ddim(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            alpha, alpha_next = bar[t], 1.0 if after is None else bar[after]
            epsilon = denoise(x, torch.full((len(x),), t))
            start = ((x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)).clamp(-1, 1)
            x = math.sqrt(alpha_next) * start + math.sqrt(1 - alpha_next) * epsilon
        return x

    return FilmUnet(), Description(
        example_inputs={"x": torch.randn(2, 3, 8, 8), "time": torch.tensor([900, 40])},
        sample="x",
        timestep="time",
        sampler=ddim,
        timesteps=timesteps,
        config={"dim": 8},
    )


class DitBlock(nn.Module):
    """adaLN-zero block (Peebles and Xie 2023); ``explicit`` spells the attention out."""

    def __init__(self, dim: int, heads: int, explicit: bool) -> None:
        super().__init__()
        self.heads, self.explicit = heads, explicit
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attend(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.explicit:
            weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(dim=-1)
            out = weights @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attend(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        return x + gate2[:, None] * self.mlp(self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None])


class TinyDit(nn.Module):
    """Flow-matching transformer: real t in [0, 1], class labels, velocity out."""

    def __init__(self, dim: int = 16, patch: int = 2, size: int = 8, channels: int = 4) -> None:
        super().__init__()
        self.patch, self.grid, self.channels = patch, size // patch, channels
        self.patchify = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(0.1 * torch.randn(1, self.grid**2, dim))
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 4, dim // 2)))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(CLASSES + 1, dim)
        self.blocks = nn.ModuleList([DitBlock(dim, 2, explicit=False), DitBlock(dim, 2, explicit=True)])
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, patch**2 * channels)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        c = self.time(torch.cat((angles.cos(), angles.sin()), dim=-1)) + self.label(y)
        x = self.patchify(z).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.head(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(-1, self.grid, self.grid, self.patch, self.patch, self.channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(-1, self.channels, self.grid * self.patch, self.grid * self.patch)


def build_dit() -> tuple[nn.Module, Description]:
    torch.manual_seed(1)
    timesteps = torch.linspace(1, 0, 4)[:-1]  # 1, 2/3, 1/3: not exact in binary

    def euler(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x, y = noise, conditioning["y"]
        both = torch.cat((y, torch.full_like(y, CLASSES)))
        for t, after in zip(timesteps, [*timesteps[1:], torch.tensor(0.0)], strict=True):
            given, without = denoise(torch.cat((x, x)), t, y=both).chunk(2)
            x = x + (after - t) * (without + 1.5 * (given - without))
        return x

    return TinyDit(), Description(
        example_inputs={"z": torch.randn(2, 4, 8, 8), "t": torch.tensor([1.0, 1 / 3]), "y": torch.tensor([0, CLASSES])},
        sample="z",
        timestep="t",
        sampler=euler,
        timesteps=timesteps,
        conditioning={"y": torch.arange(CLASSES)},
        unconditional={"y": torch.tensor(CLASSES)},
    )


class EdmSignal(nn.Module):
    """EDM preconditioning (Karras et al. 2022) of a 1-D network; sigma is one number for the batch."""

    data_std = 0.5

    def __init__(self, channels: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim) * 2)
        self.embed = nn.Linear(2 * dim, 2 * dim)
        self.enter = nn.Conv1d(channels, dim, 3, padding=1)
        self.down = nn.Conv1d(dim, 2 * dim, 4, stride=2, padding=1)
        self.squeeze, self.excite = nn.Linear(2 * dim, dim), nn.Linear(dim, 2 * dim, bias=False)
        self.mix = nn.Conv1d(2 * dim, 2 * dim, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose1d(2 * dim, dim, 4, stride=2, padding=1)
        self.leave = nn.Conv1d(2 * dim, channels, 3, padding=1)

    def network(self, x: Tensor, noise_level: Tensor) -> Tensor:
        angles = noise_level * self.frequencies
        embedding = functional.silu(self.embed(torch.cat((angles.cos(), angles.sin()))))  # [C]: no batch axis at all
        skip = functional.silu(self.enter(x))
        h = functional.silu(self.down(skip) + embedding[:, None])
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(h.mean(-1)))))
        h = functional.silu(self.mix(h * gate[..., None]))
        return self.leave(torch.cat((functional.silu(self.up(h)), skip), dim=1))

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + self.data_std**2).sqrt()
        c_skip, c_out = self.data_std**2 / total**2, sigma * self.data_std / total
        return c_skip * noisy + c_out * self.network(noisy / total, sigma.log() / 4)


def build_edm() -> tuple[nn.Module, Description]:
    torch.manual_seed(2)
    ramp = torch.linspace(0, 1, 5)
    sigmas = (5.0 ** (1 / 7) + ramp * (0.05 ** (1 / 7) - 5.0 ** (1 / 7))) ** 7

    def euler(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise * sigmas[0]
        for sigma, after in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], strict=True):
            slope = (x - denoise(x, sigma)) / sigma
            x = x + (after - sigma) * slope
        return x

    return EdmSignal(), Description(
        example_inputs={"noisy": torch.randn(2, 2, 16), "sigma": torch.tensor(1.0)},
        sample="noisy",
        timestep="sigma",
        sampler=euler,
        timesteps=sigmas,
    )


FACTORIES = {"film_unet": build_film_unet, "dit": build_dit, "edm": build_edm}


def denoiser_of(name: str) -> Denoiser:
    """A fresh model, described and checked."""
    return describe(*FACTORIES[name](), steps=None, source=name)


@functools.cache
def captured(name: str) -> tuple[Denoiser, DiffusionProgram]:
    """One capture for all tests that only look: it takes seconds."""
    denoiser = denoiser_of(name)
    return denoiser, capture(denoiser)


PLAIN = Method(les="off", pts="off", split_skips=False, error_feedback=False)
"""Round to nearest on observed ranges: nothing is learned, nothing is rewritten."""


@dataclass(frozen=True)
class Quantized:
    """One of the models, quantized.

    Attributes:
        program: What the recipe is for, with its skip concatenations split.
        steps: The trajectory it was calibrated on.
    """

    denoiser: Denoiser
    program: DiffusionProgram
    steps: tuple[CalibrationStep, ...]
    recipe: QuantRecipe


def silent(done: int, total: int) -> None:
    """No progress."""


def quantized(
    name: str, weight_bits: int, activation_bits: int, method: Method = PLAIN, seed: int = 0, progress: Step = silent
) -> Quantized:
    """Calibrate on two images and quantize with the least effort."""
    denoiser, program = captured(name)
    steps = calibrate(denoiser, images=2, seed=seed, progress=silent)
    plan = QuantPlan(
        "test", weight_bits, activation_bits, method, find_effort("fast", weight_bits), frozenset({"conv"}), seed=seed
    )
    subject = prepare(program, denoiser, steps, plan, {})
    return Quantized(denoiser, subject.program, steps, quantize(subject, plan, progress))


def walk(timesteps: list[int] | list[float]) -> object:
    """A sampler for probes: visit each timestep and move a little."""

    def sampler(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = noise
        for t in timesteps:
            x = x - 0.2 * denoise(x, t, **conditioning)
        return x

    return sampler


def float_model(program: DiffusionProgram) -> onnx.ModelProto:
    """The float graph of a program, weights inside."""
    graph = float_graph(program)
    return export_model(import_graph(graph.proto, graph.weights))


def probe(module: nn.Module, *, timesteps: list[int] | list[float] | None = None, **fields: object) -> Denoiser:
    """Wrap a few-line module of ``forward(sample, timestep)`` on [N, 3, 8, 8], unless told otherwise."""
    times = [3, 1] if timesteps is None else timesteps
    given = {
        "example_inputs": {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([times[0], times[-1]])},
        "sampler": walk(times),
        "timesteps": times,
        **fields,
    }
    return describe(module, Description(**given), steps=None, source=type(module).__name__)
