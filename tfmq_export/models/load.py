"""Load every kind of input through one function."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pipeline_folder import is_pipeline
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.diffusers_model import Sampling, class_of, denoiser_of
from tfmq_export.models.factory import load_factory
from tfmq_export.models.layouts.descriptions import read_scheduler_beside
from tfmq_export.models.layouts.find import Layout, find_layout, is_raw
from tfmq_export.models.layouts.folders import class_name, read_config
from tfmq_export.models.layouts.lora import LoraFile, fuse
from tfmq_export.models.layouts.opened import Opened, noted
from tfmq_export.models.layouts.read import read_layout
from tfmq_export.models.prompts import read_prompts
from tfmq_export.models.recorded.load import denoiser_from_pipeline
from tfmq_export.models.recorded.pipeline import missing_parts
from tfmq_export.models.recorded.requests import REQUESTS, read_requests

DEFAULT_STEPS = 50
INTERFACE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "guidance_embeds",
)
"""Of a denoiser's configuration: what the rest of a pipeline has to fit."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and how it will be sampled.

    Attributes:
        path: A diffusers folder, a checkpoint in one file, a ``model.pt``, or the weights of ``factory``; None where
            the factory's module has its weights already.
        factory: ``package.module:build`` for any other ``nn.Module``.
        steps: Denoising steps; None takes 50, or what a factory's own sampler says.
        conditioning: safetensors file with prompt embeddings.
        prompts: List of prompts, or of a pipeline's call arguments, for a pipeline that runs as it is.
        guidance_scale: Overrides the model's own.
        scheduler: "ddim", "euler", ..., "own" or the path of a scheduler_config.json; None takes a
            pipeline's own; for a single model DDIM, or its own where it was trained by flow matching.
        variant: Which weights of a diffusers folder, as "fp16"; None takes the plain ones, or the only ones there are.
            Of a single file "raw": as the last step left them; None takes their average (EMA) where there is one.
        lora: LoRA files that are fused into the weights in this order, as ``FILE`` or ``FILE:SCALE``.
        pipeline: A pipeline folder in which the denoiser of ``path`` takes the place of its own.
    """

    path: Path | None
    factory: str | None = None
    steps: int | None = None
    conditioning: Path | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    prompts: Path | None = None
    variant: str | None = None
    lora: Sequence[str] = ()
    pipeline: Path | None = None

    @property
    def name(self) -> str:
        """Of the model, in messages."""
        return str(self.path or self.factory)


def source_of(
    bundle: Bundle,
    model: Path | None,
    factory: str | None = None,
    *,
    variant: str | None = None,
    lora: Sequence[str] = (),
    pipeline: Path | None = None,
) -> Source:
    """The float model of a bundle, sampled the way the bundle is."""
    sampler = bundle.manifest.sampler
    lora = tuple(str(Path(each).absolute()) for each in lora)  # read from other folders, too
    if bundle.manifest.call is not None and factory is None:
        asked = bundle.root / "tfmq" / REQUESTS
        prompts, kept = asked if asked.exists() else None, bundle.scheduler.absolute()
        scheduler = str(kept) if kept.exists() else None
        return Source(
            model,
            steps=sampler.steps,
            scheduler=scheduler,
            prompts=prompts,
            variant=variant,
            lora=lora,
            pipeline=pipeline,
        )
    if factory is not None or not bundle.scheduler.exists():
        return Source(model, factory, sampler.steps, variant=variant, lora=lora, pipeline=pipeline)
    stored = bundle.root / "tfmq" / "conditioning.npz"
    conditioning = stored if stored.exists() else None
    return Source(
        model,
        steps=sampler.steps,
        conditioning=conditioning,
        guidance_scale=sampler.guidance_scale,
        scheduler=str(bundle.scheduler.absolute()),
        variant=variant,
        lora=lora,
        pipeline=pipeline,
    )


def load(source: Source) -> Denoiser:
    """Load a model from a folder, a file or a factory.

    Raises:
        LoadError: the path cannot be read; says why and what next.
        ConfigError: the options do not fit together.
    """
    if source.steps is not None and source.steps < 1:
        raise ConfigError(f"--steps {source.steps}: at least 1")
    if source.factory is not None:
        if source.conditioning is not None:
            raise ConfigError("--conditioning and --factory: a factory brings its own examples in its Description")
        if source.prompts is not None or source.guidance_scale is not None:
            option = "--prompts" if source.prompts is not None else "--guidance-scale"
            raise ConfigError(f"{option} and --factory: a factory brings its own conditioning and guidance")
        if source.scheduler is not None:
            raise ConfigError("--scheduler and --factory: a factory brings its own sampler in its Description")
        if source.pipeline is not None:
            raise ConfigError("--pipeline and --factory: return (module, draw) from the factory, and draw with it")
        if source.lora:
            raise ConfigError("--lora and --factory: this is for models of diffusers; let the factory do it")
        if source.path is None and source.variant is not None:
            raise ConfigError(f"--variant {source.variant}: says which weights of a file, and no file was given")
        raw = source.path is not None and is_raw(source.variant, source.path)
        return load_factory(source.factory, source.path, source.steps, raw=raw)
    if source.path is None:
        raise ConfigError("no model: give its folder or file, or --factory package.module:build that builds one")
    layout = find_layout(source.path, source.variant)
    loras = [LoraFile.of(each) for each in source.lora]
    where = "/".join(source.path.absolute().parts[-2:])
    given = None
    if source.pipeline is not None:
        layout, given = _in_pipeline(source.pipeline, layout)
    whole = None if layout.folder is None or source.conditioning is not None else layout.folder
    lacking = () if whole is None or not is_pipeline(whole.root) else missing_parts(whole.root)
    asked = source.pipeline is not None or source.prompts is not None  # then the pipeline says itself what it lacks
    if whole is not None and is_pipeline(whole.root) and (asked or not lacking):
        return denoiser_from_pipeline(
            whole,
            DEFAULT_STEPS if source.steps is None else source.steps,
            requests=() if source.prompts is None else read_requests(source.prompts),
            guidance_scale=source.guidance_scale,
            scheduler=source.scheduler,
            loras=loras,
            given=given,
            where=where,
        )
    if source.pipeline is not None:
        raise ConfigError("--pipeline and --conditioning: a pipeline embeds its prompts; leave one of them out")
    if source.prompts is not None:
        raise ConfigError(
            "--prompts is for pipelines that run as they are; add --pipeline FOLDER, or give --conditioning instead"
        )
    opened = read_layout(layout)
    fused = tuple(fuse(opened.model, each) for each in loras)
    prompts = opened.prompts
    if source.conditioning is not None:
        prompts = read_prompts(source.conditioning, prompts.guidance_scale)
    if source.guidance_scale is not None:
        prompts = replace(prompts, guidance_scale=source.guidance_scale)
    sampling = Sampling(DEFAULT_STEPS if source.steps is None else source.steps, source.scheduler)
    class_of(type(opened.model).__name__, where)
    denoiser = denoiser_of(opened.model, opened.scheduler, prompts, sampling, where=where)
    apart = (f"alone, for its pipeline lacks {', '.join(lacking)}",) if lacking else ()
    return replace(denoiser, pipeline=layout.pipeline, source=noted(where, (*opened.notes, *apart, *fused)))


def _in_pipeline(folder: Path, layout: Layout) -> tuple[Layout, Opened]:
    """A pipeline, and the denoiser that takes the place of its own.

    Raises:
        LoadError: no pipeline, or one with a denoiser of another class or of other inputs.
    """
    pipeline = find_layout(folder)
    if pipeline.folder is None or not is_pipeline(pipeline.folder.root):
        raise LoadError(f"--pipeline {folder}: no pipeline folder of diffusers, which has a model_index.json")
    # Its own scheduler is what the pipeline runs with, so a file need not say which it was trained for.
    opened = read_layout(layout, read_scheduler_beside(pipeline.folder.root))
    wanted = read_config(pipeline.folder.component)
    config: Any = opened.model.config  # of diffusers, which torch's types do not know
    if class_name(wanted) != type(opened.model).__name__:
        raise LoadError(f"{layout.path}: a {type(opened.model).__name__}, but {folder} runs a {class_name(wanted)}")
    for name in INTERFACE:
        if name in wanted and wanted[name] != config.get(name):
            raise LoadError(f"{layout.path}: {name} is {config.get(name)}, in {folder} {wanted[name]}; they do not fit")
    rest = f"in {folder.name or folder}, with its text encoders, VAE and scheduler"
    return pipeline, replace(opened, notes=(*opened.notes, rest))
