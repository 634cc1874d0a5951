"""Call a compiled graph like the module it was compiled from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.recipe.timesteps import timestep_vector
from tfmq_export.runtime.loaded import LoadedBundle


def bundle_denoise(loaded: LoadedBundle) -> Denoise:
    """A compiled graph that stands in for the module in any sampler."""

    def denoise(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        arrays = {name: value.detach().numpy() for name, value in conditioning.items()}
        steps = timestep_vector(torch.as_tensor(timestep).numpy())
        return torch.from_numpy(np.asarray(loaded(sample.detach().numpy(), steps, **arrays)))

    return denoise


def run_bundle(loaded: LoadedBundle, denoiser: Denoiser, inputs: Mapping[str, Tensor]) -> NDArray[Any]:
    """One prediction of a compiled graph on recorded model inputs."""
    conditioning = dict(inputs)
    sample, timestep = conditioning.pop(denoiser.sample), conditioning.pop(denoiser.timestep)
    return bundle_denoise(loaded)(sample, timestep, **conditioning).numpy()
