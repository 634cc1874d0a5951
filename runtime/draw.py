"""Images from a bundle alone, in numpy: with its own schedule, its stored prompts and its guidance."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.sampler import DdimSchedule, guided, prompted, sample


def stored_prompts(bundle: Bundle, rows: int) -> dict[str, NDArray[np.generic]]:
    """The examples of conditioning that a bundle brings along, in turn, [rows, ...] by name.

    Raises:
        ConfigError: it brings none for an input.
    """
    stored = bundle.conditioning()
    names = [entry.name for entry in bundle.manifest.input("conditioning")]
    if missing := [name for name in names if name not in stored]:
        raise ConfigError(f"{bundle.root}: has no example of {', '.join(missing)} in tfmq/conditioning.npz to ask with")
    return {name: stored[name][np.arange(rows) % len(stored[name])] for name in names}


def drawn(
    loaded: LoadedBundle,
    noise: NDArray[np.float32],
    schedule: DdimSchedule | LinearWalk,
    conditioning: Mapping[str, NDArray[Any]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Draw as the bundle was compiled to, guided where it was.

    Args:
        noise: Standard normal, [N, ...].
        schedule: From ``schedule_of``.
        conditioning: [N, ...] by input name.
        progress: Called after each step with the steps done and their total.
    Returns:
        Images as the model was trained on them, [N, ...]: pictures in -1..1, or latents.
    """
    stored, scale = loaded.bundle.conditioning(), loaded.bundle.manifest.sampler.guidance_scale
    names = {name: f"{name}.unconditional" for name in conditioning}
    if names and scale != 1.0 and all(name in stored for name in names.values()):
        empty = {name: stored[kept] for name, kept in names.items()}
        return sample(guided(loaded, conditioning, empty, scale), noise, schedule, progress=progress)
    return sample(prompted(loaded, conditioning), noise, schedule, progress=progress)
