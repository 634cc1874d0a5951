"""Drawing images with a bundle, alone or beside the model it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pipeline_folder import is_pipeline
from tfmq_export.capture.denoiser import Denoise, seeds_of
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.integrations.diffusers import CompiledDenoiser
from tfmq_export.models.load import Source, load
from tfmq_export.models.recorded.pipeline import PipelineCode, call_arguments, open_pipeline
from tfmq_export.models.recorded.record import drawn_by
from tfmq_export.models.recorded.requests import REQUESTS, read_requests
from tfmq_export.models.schedulers import OWN, choose_scheduler, scheduler_config
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.progress import Progress, Step
from tfmq_export.proof.pictures import load_picture
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.proof.validate import as_images
from tfmq_export.ptq.walk.calibration import record
from tfmq_export.recipe.plain import read_json
from tfmq_export.runtime.decode import decodes, looked_at
from tfmq_export.runtime.loaded import load as load_bundle
from tfmq_export.runtime.measure.compare import as_pictures

Rows = list[tuple[str, NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class Request:
    """What to draw.

    Attributes:
        images: How many.
        seed: Of the starting noise.
        threads: Of the engine.
        scheduler: As ``choose_scheduler`` takes it; None for the bundle's own.
        steps: None for those the bundle was compiled with.
        start: A picture to begin from, in place of noise alone.
        strength: How much of the walk is left to walk from there.
    """

    images: int
    seed: int = 0
    threads: int = 2
    scheduler: str | None = None
    steps: int | None = None
    start: Path | None = None
    strength: float = 0.5


def draw(bundle: Bundle, request: Request, progress: Progress) -> NDArray[np.float32]:
    """Sample with the bundle alone; pictures in 0..1, [N, C, H, W].

    Raises:
        TimestepError: the schedule leaves the bundle's table; nothing was computed.
        ConfigError: no scheduler of diffusers draws from this bundle.
    """
    manifest = bundle.manifest
    stored = {name: torch.from_numpy(value) for name, value in bundle.conditioning().items()}
    names = [entry.name for entry in manifest.input("conditioning")]
    sampler = _sampler(bundle, request, {name: stored.get(f"{name}.unconditional") for name in names})
    walk = sampler.walk_from(request.strength) if request.start is not None else sampler.walk
    kind = type(sampler.scheduler).__name__
    manifest.timesteps.require(walk.numpy(), f"{bundle.root}: {kind} in {sampler.steps} steps")
    (info,) = manifest.input("sample")
    shape = tuple(int(side or 1) for side in info.shape)
    noise = torch.from_numpy(np.random.default_rng(request.seed).standard_normal((request.images, *shape), np.float32))
    prompts = {name: stored[name][torch.arange(request.images) % len(stored[name])] for name in names}
    with load_bundle(bundle.root, threads=request.threads) as loaded, progress.stage("Sampling") as step:
        denoise = _counted(bundle_denoise(loaded), step, len(walk))
        if request.start is None:
            result = sampler(denoise, noise, prompts)
        else:
            start = torch.from_numpy(load_picture(request.start, shape) * 2 - 1).expand_as(noise)
            result = sampler.from_images(denoise, start, noise, prompts, strength=request.strength)
    return looked_at(bundle, result.numpy(), threads=request.threads)


def draw_in_pipeline(bundle: Bundle, request: Request, progress: Progress) -> NDArray[np.float32]:
    """Sample with the pipeline that the bundle was recorded in and that lies beside it; pictures in 0..1, [N, C, H, W].

    Raises:
        TimestepError: the schedule leaves the bundle's table.
        ConfigError: the pipeline does not lie beside it, or cannot start from a picture.
    """
    manifest = bundle.manifest
    if not is_pipeline(bundle.root):
        raise ConfigError(
            f"{bundle.root}: holds no pipeline to draw with; give the model with --against, and --factory where it was "
            "compiled from code"
        )
    if request.start is not None:
        raise ConfigError("--image: a pipeline that starts from pictures takes them in its prompts; leave it out")
    steps = request.steps or manifest.sampler.steps
    asked = bundle.root / "tfmq" / REQUESTS
    with progress.stage("Loading"):
        compiled = CompiledDenoiser.from_pretrained(bundle.root, threads=request.threads)
        pipeline = open_pipeline(bundle.root, **{manifest.component: compiled})
        if request.scheduler is not None:
            config = scheduler_config(pipeline.scheduler)
            pipeline.scheduler = choose_scheduler(config, request.scheduler, str(bundle.root))
    code = PipelineCode(pipeline, read_requests(asked) if asked.exists() else (), call_arguments(pipeline, steps))
    together = 1 if manifest.call is None else manifest.call.together  # as for the proof: padding follows the longest
    parts = seeds_of(request.seed, request.images, together)
    drawn = []
    with progress.stage("Sampling") as step:
        for done, seeds in enumerate(parts, 1):
            drawn.append(drawn_by(code, seeds, True, str(bundle.root)))
            step(done, len(parts))
    return as_pictures(torch.cat(drawn).numpy())


def draw_against(bundle: Bundle, source: Source, request: Request, progress: Progress) -> Rows:
    """Sample with the float model and with the bundle, from the same noise."""
    with progress.stage("Loading"):
        model = load(source)
    bundle.manifest.timesteps.require(model.timesteps.array, f"{bundle.root}: {model.sampler_info.kind}")
    runs = model.runs(request.images, request.seed, pictures=True)
    with progress.stage("Sampling in full precision") as step:
        _, reference = record(model, model.module_denoise(), runs, step)
    with load_bundle(bundle.root, threads=request.threads) as loaded, progress.stage("Sampling the bundle") as step:
        _, compiled = record(model, bundle_denoise(loaded), runs, step)
    above, below, _ = as_images(reference, compiled)
    if decodes(bundle, above.shape[1:]):
        above, below = (looked_at(bundle, batch, threads=request.threads) for batch in (above, below))
    return [("full precision", above), ("compiled", below)]


def _sampler(bundle: Bundle, request: Request, unconditional: Mapping[str, Tensor | None]) -> DiffusersSampler:
    info = bundle.manifest.sampler
    if not bundle.scheduler.exists():
        raise ConfigError(
            f"{bundle.root}: its factory brought a sampler of its own; give the model with --against and --factory"
        )
    try:
        config = read_json(bundle.scheduler)
    except (OSError, ValueError) as error:
        raise LoadError(f"{bundle.scheduler}: not a readable scheduler configuration ({error})") from error
    scheduler = choose_scheduler(config, request.scheduler or OWN, str(bundle.root))
    empty = {name: value for name, value in unconditional.items() if value is not None}
    return DiffusersSampler(scheduler, request.steps or info.steps, empty, info.guidance_scale)


def _counted(denoise: Denoise, step: Step, calls: int) -> Denoise:
    """The same denoiser, which tells how far its walk is."""
    done = 0

    def counted(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        nonlocal done
        prediction = denoise(sample, timestep, **conditioning)
        done += 1
        step(done, calls)
        return prediction

    return counted
