"""diffusers U-Nets: which classes load, and how their ``forward`` becomes one flat tensor function."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tfmq_export.bundle import SamplerInfo
from tfmq_export.denoiser import Conditioning, Denoiser
from tfmq_export.errors import LoadError
from tfmq_export.models.sampling import DiffusersSampler, ddim_from_config

ARCHITECTURES: Mapping[str, type[Any]] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
}


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Conditioning to calibrate with.

    Attributes:
        examples: [examples, ...] by input name.
        unconditional: [...] by input name; empty without guidance.
        guidance_scale: None leaves guidance off.
    """

    examples: Conditioning = field(default_factory=dict)
    unconditional: Conditioning = field(default_factory=dict)
    guidance_scale: float | None = None


class _Unconditional(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample, timestep, return_dict=False)[0]


class _ClassConditional(_Unconditional):
    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]  # one more
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


class _CrossAttention(_Unconditional):
    def forward(  # type: ignore[override]  # one more
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def build(architecture: str, config: Mapping[str, Any], where: str | Path) -> nn.Module:
    """Construct an empty model of a known class.

    Raises:
        LoadError: the class is unknown or the configuration is not one of its own.
    """
    if architecture not in ARCHITECTURES:
        raise LoadError(
            f"{where}: cannot load {architecture!r}, only {' and '.join(ARCHITECTURES)}; "
            "for any other module use --factory package.module:build"
        )
    try:
        model: nn.Module = ARCHITECTURES[architecture].from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise LoadError(f"{where}: not a configuration of {architecture}: {error}") from error
    return model


def denoiser_of(
    model: nn.Module, scheduler: Mapping[str, Any], prompts: PromptSet, *, steps: int, where: str
) -> Denoiser:
    """Describe a loaded diffusers model.

    Raises:
        LoadError: the model needs conditioning and ``prompts`` has none that fits.
    """
    settings: Any = model.config  # of diffusers, which torch's types do not know
    config: dict[str, Any] = {**settings}
    module, examples = _flatten(model, config, prompts, where)
    guidance = prompts.guidance_scale if prompts.guidance_scale is not None and prompts.unconditional else 1.0
    sampler = DiffusersSampler(ddim_from_config(scheduler, where), steps, prompts.unconditional, guidance)
    size = config["sample_size"]
    if size is None:
        raise LoadError(f"{where}: config.json has no sample_size; add the height and width the model was trained on")
    height, width = (size, size) if isinstance(size, int) else size
    timesteps = sampler.timesteps
    inputs = {
        "sample": torch.randn(2, config["in_channels"], height, width, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([timesteps.values[0], timesteps.values[-1]]),
        **{name: value[torch.arange(2) % len(value)] for name, value in examples.items()},
    }
    return Denoiser(
        module=module.eval().float().requires_grad_(False),
        example_inputs=inputs,
        sample="sample",
        timestep="timestep",
        timesteps=timesteps,
        sampler=sampler,
        sampler_info=SamplerInfo("DDIMScheduler", steps, guidance),
        conditioning=examples,
        unconditional=prompts.unconditional,
        component="unet",
        config={key: value for key, value in config.items() if key != "_name_or_path"},
        scheduler_config={**sampler.scheduler.config, "_class_name": "DDIMScheduler"},
        source=where,
    )


def _flatten(
    model: nn.Module, config: Mapping[str, Any], prompts: PromptSet, where: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The wrapper with the right arguments, and conditioning examples for them."""
    for option in ("addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "class_embed_type"):
        if config.get(option) is not None and isinstance(model, UNet2DConditionModel):
            raise LoadError(f"{where}: models with {option} need their extra inputs named; use --factory")
    if isinstance(model, UNet2DConditionModel):
        width = config["cross_attention_dim"]
        given = prompts.examples.get("encoder_hidden_states")
        if given is None or given.ndim != 3 or (isinstance(width, int) and given.shape[2] != width):
            shape = "none" if given is None else str(list(given.shape))
            raise LoadError(
                f"{where}: calibration needs real prompt embeddings, encoder_hidden_states [prompts, tokens, {width}], "
                f"got {shape}; give a safetensors file with --conditioning"
            )
        return _CrossAttention(model), {"encoder_hidden_states": given.float()}
    if config.get("num_class_embeds"):
        return _ClassConditional(model), {"class_labels": torch.arange(config["num_class_embeds"])}
    if prompts.examples:
        raise LoadError(f"{where}: {type(model).__name__} takes no conditioning, got {', '.join(prompts.examples)}")
    return _Unconditional(model), {}
