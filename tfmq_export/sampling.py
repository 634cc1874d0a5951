"""Drawing images with a bundle, alone or beside the model it came from."""

import json

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle import Bundle
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.load import Source, load
from tfmq_export.progress import Progress
from tfmq_export.ptq.calibration import record
from tfmq_export.runtime.denoiser import load as load_bundle
from tfmq_export.runtime.sampler import DdimSchedule, guided, prompted
from tfmq_export.runtime.sampler import sample as run_ddim
from tfmq_export.validate import as_images, bundle_denoise

Rows = list[tuple[str, NDArray[np.float32]]]


def draw(bundle: Bundle, images: int, seed: int, threads: int, progress: Progress) -> NDArray[np.float32]:
    """Sample with the bundle alone, by DDIM in numpy; pictures in 0..1, [N, C, H, W].

    Raises:
        ConfigError: the bundle's sampler is not DDIM.
    """
    manifest = bundle.manifest
    if manifest.sampler.kind != "DDIMScheduler":
        raise ConfigError(
            f"{bundle.root}: sampled with {manifest.sampler.kind}; give the model with --against to use its sampler"
        )
    try:
        config = json.loads(bundle.scheduler.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{bundle.scheduler}: not a readable scheduler configuration ({error})") from error
    schedule = DdimSchedule.from_config(config, manifest.sampler.steps)
    (info,) = manifest.input("sample")
    shape = tuple(int(side or 1) for side in info.shape)
    noise = np.random.default_rng(seed).standard_normal((images, *shape), np.float32)
    stored = bundle.conditioning()
    names = [entry.name for entry in manifest.input("conditioning")]
    conditioning = {name: stored[name][np.arange(images) % len(stored[name])] for name in names}
    unconditional = {name: stored[f"{name}.unconditional"] for name in names if f"{name}.unconditional" in stored}
    with load_bundle(bundle.root, threads=threads) as denoiser, progress.stage("Sampling") as step:
        if unconditional and manifest.sampler.guidance_scale != 1.0:
            denoise = guided(denoiser, conditioning, unconditional, manifest.sampler.guidance_scale)
        else:
            denoise = prompted(denoiser, conditioning)
        result = run_ddim(denoise, noise, schedule, progress=step)
    return np.asarray((np.clip(result, -1, 1) + 1) / 2, np.float32)


def draw_against(bundle: Bundle, source: Source, images: int, seed: int, threads: int, progress: Progress) -> Rows:
    """Sample with the float model and with the bundle, from the same noise."""
    with progress.stage("Loading"):
        model = load(source)
    noise, prompts = model.noise(images, seed), model.prompts(images)
    with progress.stage("Sampling in full precision") as step:
        _, reference = record(model, model.module_denoise(), noise, prompts, step)
    with load_bundle(bundle.root, threads=threads) as loaded, progress.stage("Sampling the bundle") as step:
        _, compiled = record(model, bundle_denoise(loaded, model), noise, prompts, step)
    above, below, _ = as_images(reference, compiled)
    return [("full precision", above), ("compiled", below)]
