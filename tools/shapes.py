"""Networks in the shapes people deploy, with random weights: nothing is downloaded, and speed is the same.

    python tools/shapes.py sd out/sd.safetensors        # the weights, which every command takes as the model
    tfmq-export out/sd.safetensors --factory tools.shapes:sd --config tools/shapes.toml --steps 4 -o out/sd
    tfmq-bench out/sd --against out/sd.safetensors --factory tools.shapes:sd --accuracy

A DDPM U-Net, a latent U-Net with cross-attention as in Stable Diffusion, and a class-conditional DiT (``ddpm``, ``sd``,
``dit``), each ``full`` for benchmarks and ``tiny`` for tests (``tiny_sd``). The weights are seeded and scaled as in a
trained network: every layer keeps the variance of its input, channels differ in magnitude, and the prediction of unit
noise has unit variance.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tfmq_export.capture.denoiser import Description, first_tensor

SIZES = ("tiny", "full")
SPREAD = 0.4  # standard deviation of the logarithm of a channel's gain
CLASSES = 10
PROMPTS = 4


def build(name: str, size: str = "tiny", steps: int = 4, seed: int = 0) -> tuple[nn.Module, Description]:
    """A network and what the compiler needs to know about it.

    Args:
        name: One of ``SHAPES``.
        size: "tiny" or "full".
        steps: DDIM steps.
        seed: Of weights and conditioning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, inputs, conditioning = SHAPES[name](size)
        _scale(module.eval().requires_grad_(False), inputs)
    scheduler = DDIMScheduler()  # it clips: a random network would send the sample anywhere
    scheduler.set_timesteps(steps)
    names = list(inputs)
    return module, Description(
        example_inputs=inputs,
        sampler=scheduler,
        timesteps=[int(t) for t in scheduler.timesteps],
        sample=names[0],
        timestep=names[1],
        conditioning=conditioning,
        config={"shape": name, "size": size},
    )


Shape = tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]
"""A module, its example inputs (sample and timestep first), and conditioning to calibrate with."""


def tiny_unet(side: int = 16, width: int = 16, **more: object) -> UNet2DModel:
    """Two levels with attention on the second.

    Args:
        side: Of the image.
        width: Channels of the first level; the second has twice as many.
        more: Of ``UNet2DModel``.
    """
    return UNet2DModel(
        sample_size=side,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **more,
    )


def _ddpm(size: str) -> Shape:
    """Full: the U-Net of google/ddpm-cifar10-32, 36 M parameters, 32 x 32 pixels."""
    if size == "full":
        module = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,  # one head as wide as the block
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )
    else:
        module = tiny_unet()
    side = module.config["sample_size"]
    return module, {"sample": torch.randn(2, 3, side, side), "timestep": torch.tensor([750, 0])}, {}


def _sd(size: str) -> Shape:
    """Full: Stable Diffusion 1's U-Net at a fifth of its width, 64 x 64 latents, so attention over 4096 tokens."""
    if size == "full":
        side, tokens, width = 64, 77, 768
        module = UNet2DConditionModel(
            sample_size=side,
            block_out_channels=(64, 128, 256, 256),
            attention_head_dim=(2, 4, 8, 8),  # diffusers' name for the number of heads
            cross_attention_dim=width,
        )
    else:
        side, tokens, width = 16, 5, 16
        module = UNet2DConditionModel(
            sample_size=side,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=width,
        )
    context = torch.randn(PROMPTS, tokens, width)
    inputs = {
        "sample": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([750, 0]),
        "encoder_hidden_states": context[:2].clone(),
    }
    return module, inputs, {"encoder_hidden_states": context}


def _dit(size: str) -> Shape:
    """Full: DiT-S/2 on 32 x 32 latents, 256 tokens."""
    heads, head, layers, side = (6, 64, 12, 32) if size == "full" else (2, 16, 2, 8)
    module = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=4,
        num_layers=layers,
        norm_num_groups=4,
        sample_size=side,
        num_embeds_ada_norm=CLASSES,
    )
    labels = torch.arange(CLASSES)
    inputs = {
        "hidden_states": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([750, 0]),
        "class_labels": labels[:2].clone(),
    }
    return module, inputs, {"class_labels": labels}


SHAPES: Mapping[str, Callable[[str], Shape]] = {"ddpm": _ddpm, "sd": _sd, "dit": _dit}


def _factory(name: str, size: str) -> tuple[nn.Module, Description]:
    """As ``--factory`` calls it; ``--steps`` says which timesteps."""
    module, description = build(name, size)
    return module, replace(description, timesteps=None)


ddpm, sd, dit = (partial(_factory, name, "full") for name in SHAPES)
tiny_ddpm, tiny_sd, tiny_dit = (partial(_factory, name, "tiny") for name in SHAPES)


@torch.no_grad()
def _scale(module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Give every layer weights that keep its input's variance, and the prediction a variance of 1."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            fan_in = part.weight[0].numel()
            gains = _gains(len(part.weight)).reshape(-1, *(1,) * (part.weight.ndim - 1))
            part.weight.normal_(std=1 / math.sqrt(fan_in)).mul_(gains)
            last = part
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm)) and part.weight is not None:
            part.weight.copy_(_gains(len(part.weight)))
        bias = getattr(part, "bias", None)
        if isinstance(bias, Tensor):
            bias.normal_(std=0.1)
    # diffusers registers the layer that makes the prediction last.
    prediction = first_tensor(module(**inputs))
    last.weight /= prediction.std()
    last.bias.zero_()


def _gains(channels: int) -> Tensor:
    """Log-normal, with a mean square of 1."""
    return torch.exp(SPREAD * torch.randn(channels) - SPREAD**2)


if __name__ == "__main__":
    _, name, weights = sys.argv
    module, _ = globals()[name]()
    Path(weights).parent.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), weights)
