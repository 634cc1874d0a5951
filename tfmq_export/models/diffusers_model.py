"""diffusers denoisers: which classes load, and how their ``forward`` becomes one flat tensor function."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tfmq_export.bundle.manifest import SamplerInfo
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.errors import LoadError, first_line
from tfmq_export.limits import LARGEST_SIDE, MOST_LAYERS
from tfmq_export.models import flat_modules
from tfmq_export.models.prompts import PromptSet, effective_scale, fitted, labelled
from tfmq_export.models.schedulers import choose_scheduler, scheduler_config
from tfmq_export.models.single_precision import in_single_precision
from tfmq_export.models.walk import DiffusersSampler, require_finite_walk

UNET, TRANSFORMER = "unet", "transformer"
ARCHITECTURES: Mapping[str, str] = {
    "UNet2DModel": UNET,
    "UNet2DConditionModel": UNET,
    "DiTTransformer2DModel": TRANSFORMER,
    "SD3Transformer2DModel": TRANSFORMER,
}
"""Classes of diffusers that load, and their folder in a pipeline."""

SAMPLE_OF: Mapping[str, str] = {UNET: "sample", TRANSFORMER: "hidden_states"}
"""What each kind calls its noisy sample."""

DIT_GUIDANCE = 4.0
"""Of diffusers' DiTPipeline, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images will be drawn.

    Attributes:
        steps: Denoising steps.
        scheduler: As ``choose_scheduler`` takes it; None for the default.
    """

    steps: int
    scheduler: str | None = None


def class_of(architecture: str, where: str | Path) -> Any:
    """A diffusers class by its name.

    Raises:
        LoadError: none of those that load.
    """
    if architecture not in ARCHITECTURES:
        raise LoadError(
            f"{where}: cannot load {architecture!r}, only {', '.join(ARCHITECTURES)}; "
            "for any other module use --factory package.module:build"
        )
    return getattr(diffusers, architecture)


def build(architecture: str, config: Mapping[str, Any], where: str | Path) -> nn.Module:
    """Construct an empty model of a known class.

    Raises:
        LoadError: the class is unknown or the configuration is not one of its own.
    """
    known = class_of(architecture, where)
    require_few_layers(config, where)
    try:
        model: nn.Module = known.from_config(dict(config))
    except Exception as error:  # the class's own reading of its configuration, which may raise anything
        raise LoadError(f"{where}: not a configuration of {architecture}: {first_line(error)}") from error
    return model


def require_few_layers(config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a configuration whose model would take for ever to make, before anything is made of it.

    Raises:
        LoadError: names what it counts.
    """
    for name, value in config.items():
        if "layers" not in name and "blocks" not in name:
            continue
        counts = [each for each in tree_leaves(value) if isinstance(each, int | float)]
        if any(each > MOST_LAYERS for each in counts):
            raise LoadError(f"{where}: {name} is {str(max(counts))[:20]}; no model has more than {MOST_LAYERS}")


def denoiser_of(
    model: nn.Module, scheduler: Mapping[str, Any], prompts: PromptSet, sampling: Sampling, *, where: str
) -> Denoiser:
    """Describe a loaded diffusers model.

    Args:
        scheduler: Configuration of the scheduler it came with.
    Raises:
        LoadError: the model needs conditioning and ``prompts`` has none that fits.
        ConfigError: the scheduler cannot draw from this model.
    """
    settings: Any = model.config  # of diffusers, which torch's types do not know
    config: dict[str, Any] = {**settings}
    _require_own_channels(config, where)
    module, prompts = _flatten(model, config, prompts, where)
    asked = 1.0 if prompts.guidance_scale is None else prompts.guidance_scale
    guidance = effective_scale(asked, prompts.unconditional, prompts.examples, where)
    chosen = choose_scheduler(scheduler, sampling.scheduler, where)
    sampler = DiffusersSampler(chosen, sampling.steps, prompts.unconditional, guidance)
    require_finite_walk(sampler)
    height, width = _size_of(config, where)
    architecture = type(model).__name__
    component = ARCHITECTURES[architecture]
    timesteps = sampler.timesteps
    inputs = {
        SAMPLE_OF[component]: torch.randn(
            2, config["in_channels"], height, width, generator=torch.Generator().manual_seed(0)
        ),
        "timestep": torch.from_numpy(timesteps.array[[0, -1]]),
        **{name: value[torch.arange(2) % len(value)] for name, value in prompts.examples.items()},
    }
    return Denoiser(
        module=in_single_precision(module),
        example_inputs=inputs,
        sample=SAMPLE_OF[component],
        timestep="timestep",
        timesteps=timesteps,
        sampler=sampler,
        sampler_info=SamplerInfo(type(chosen).__name__, sampling.steps, guidance),
        conditioning=prompts.examples,
        unconditional=prompts.unconditional,
        component=component,
        config={key: value for key, value in config.items() if key != "_name_or_path"} | {"_class_name": architecture},
        scheduler_config=scheduler_config(chosen),
        source=where,
    )


def _size_of(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Height and width of the sample, in pixels of the model."""
    size = config["sample_size"]
    if size is None:
        raise LoadError(f"{where}: config.json has no sample_size; add the height and width the model was trained on")
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides):
        raise LoadError(f"{where}: a sample_size of {str(size)[:40]}; give height and width, 1 to {LARGEST_SIDE}")
    return sides[0], sides[1]


def _require_own_channels(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose sample has more than the noise in it: a mask, a picture. Its pipeline puts them there."""
    taken, given = config["in_channels"], config.get("out_channels")
    if given is not None and given < taken:
        raise LoadError(
            f"{where}: the model takes {taken} channels and predicts {given}; what the others hold (a mask, a picture) "
            "only its pipeline knows: give the pipeline's folder, or this model with --pipeline FOLDER"
        )


def _flatten(
    model: nn.Module, config: Mapping[str, Any], prompts: PromptSet, where: str
) -> tuple[nn.Module, PromptSet]:
    """The wrapper with the right arguments, and conditioning examples for them."""
    if isinstance(model, diffusers.UNet2DConditionModel):
        for option in ("addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "class_embed_type"):
            if config.get(option) is not None:
                raise LoadError(f"{where}: models with {option} need their extra inputs named; use --factory")
        text = {"encoder_hidden_states": ("prompts", "tokens", config["cross_attention_dim"])}
        if config.get("num_class_embeds"):
            prompts, with_labels = labelled(prompts, config["num_class_embeds"], where)
            found = fitted(prompts, text, where)
            return flat_modules.LabelledAttention(model), replace(
                found,
                examples={**found.examples, **with_labels.examples},
                unconditional={**found.unconditional, **with_labels.unconditional},
            )
        return flat_modules.CrossAttention(model), fitted(prompts, text, where)
    if isinstance(model, diffusers.SD3Transformer2DModel):
        shapes: dict[str, tuple[object, ...]] = {
            "encoder_hidden_states": ("prompts", "tokens", config["joint_attention_dim"]),
            "pooled_projections": ("prompts", config["pooled_projection_dim"]),
        }
        return flat_modules.PromptTransformer(model), fitted(prompts, shapes, where)
    if isinstance(model, diffusers.DiTTransformer2DModel):
        classes = config["num_embeds_ada_norm"]
        scale = DIT_GUIDANCE if prompts.guidance_scale is None else prompts.guidance_scale
        labels = {"class_labels": torch.arange(classes)}
        return flat_modules.ClassTransformer(model), PromptSet(labels, {"class_labels": torch.tensor(classes)}, scale)
    if config.get("class_embed_type") not in (None, "timestep", "identity"):
        raise LoadError(f"{where}: class_embed_type {config['class_embed_type']!r} is none that diffusers knows")
    classes = config.get("num_class_embeds")
    if given := sorted({*prompts.examples, *prompts.unconditional} - ({"class_labels"} if classes else set())):
        raise LoadError(f"{where}: {type(model).__name__} takes no conditioning of this kind, got {', '.join(given)}")
    if classes:
        return flat_modules.ClassConditional(model), replace(prompts, examples={"class_labels": torch.arange(classes)})
    return flat_modules.Unconditional(model), prompts
