"""Load every kind of input through one function."""

from dataclasses import dataclass, replace
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pipeline_folder import is_pipeline
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.diffusers_model import Sampling, denoiser_of
from tfmq_export.models.factory import load_factory
from tfmq_export.models.folder import read_folder
from tfmq_export.models.model_pt import read_checkpoint
from tfmq_export.models.prompts import PromptSet, read_prompts
from tfmq_export.models.recorded.load import denoiser_from_pipeline
from tfmq_export.models.recorded.requests import REQUESTS, read_requests

DEFAULT_STEPS = 50


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and how it will be sampled.

    Attributes:
        path: A diffusers folder, a ``model.pt``, or the weights of ``factory``.
        factory: ``package.module:build`` for any other ``nn.Module``.
        steps: Denoising steps; None takes 50, or what a factory's own sampler says.
        conditioning: safetensors file with prompt embeddings.
        prompts: List of prompts, or of a pipeline's call arguments, for a pipeline that runs as it is.
        guidance_scale: Overrides the model's own.
        scheduler: "ddim", "euler", ..., "own" or the path of a scheduler_config.json; None takes DDIM, or the model's
            own where it was trained by flow matching.
    """

    path: Path
    factory: str | None = None
    steps: int | None = None
    conditioning: Path | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    prompts: Path | None = None


def source_of(bundle: Bundle, model: Path, factory: str | None = None) -> Source:
    """The float model of a bundle, sampled the way the bundle is."""
    sampler = bundle.manifest.sampler
    if bundle.manifest.call is not None and factory is None:
        asked = bundle.root / "tfmq" / REQUESTS
        prompts, kept = asked if asked.exists() else None, bundle.scheduler
        return Source(model, steps=sampler.steps, scheduler=str(kept) if kept.exists() else None, prompts=prompts)
    if factory is not None or not bundle.scheduler.exists():
        return Source(model, factory, sampler.steps)
    stored = bundle.root / "tfmq" / "conditioning.npz"
    conditioning = stored if stored.exists() else None
    return Source(model, None, sampler.steps, conditioning, sampler.guidance_scale, str(bundle.scheduler))


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
        if source.scheduler is not None:
            raise ConfigError("--scheduler and --factory: a factory brings its own sampler in its Description")
        return load_factory(source.factory, source.path, source.steps)
    if not source.path.exists():
        raise LoadError(f"{source.path}: no such file or folder")
    where = "/".join(source.path.absolute().parts[-2:])
    if is_pipeline(source.path) and source.conditioning is None:
        return denoiser_from_pipeline(
            source.path,
            DEFAULT_STEPS if source.steps is None else source.steps,
            requests=() if source.prompts is None else read_requests(source.prompts),
            guidance_scale=source.guidance_scale,
            scheduler=source.scheduler,
            where=where,
        )
    if source.prompts is not None:
        raise ConfigError("--prompts is for whole pipelines, which embed them; give this model --conditioning")
    if source.path.is_dir():
        model, scheduler = read_folder(source.path)
        prompts = PromptSet()
    else:
        model, scheduler, prompts = read_checkpoint(source.path)
    if source.conditioning is not None:
        prompts = read_prompts(source.conditioning, prompts.guidance_scale)
    if source.guidance_scale is not None:
        prompts = replace(prompts, guidance_scale=source.guidance_scale)
    sampling = Sampling(DEFAULT_STEPS if source.steps is None else source.steps, source.scheduler)
    denoiser = denoiser_of(model, scheduler, prompts, sampling, where=where)
    return replace(denoiser, pipeline=source.path if is_pipeline(source.path) else None)
