"""A bundle in the place of a denoiser in the pipelines of diffusers.

    denoiser = CompiledDenoiser.from_pretrained(OUT)
    pipeline = StableDiffusionPipeline.from_pretrained(OUT, unet=denoiser)

It takes the arguments of the class it was compiled from, and refuses those that the compiled graph does not have. It
needs torch and diffusers, as the pipelines do: ``tfmq_export.runtime`` is what runs without.
"""

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.recipe.timesteps import timestep_vector
from tfmq_export.runtime.loaded import LoadedBundle, load


class CompiledDenoiser(ModelMixin, ConfigMixin):
    """What a pipeline of diffusers takes for its ``unet`` or ``transformer``.

    It computes on the CPU in the bundle's engine; tensors on another device or in another float type are brought there
    and back.

    Args:
        loaded: From ``tfmq_export.load``; ``from_pretrained`` does both.
    Raises:
        LoadError: the bundle was compiled from no class of diffusers, or its configuration cannot be read.
    """

    config_name = "config.json"

    def __init__(self, loaded: LoadedBundle) -> None:
        super().__init__()
        manifest = loaded.bundle.manifest
        path = loaded.bundle.model.with_name("config.json")
        try:
            config = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{path}: not a readable configuration ({error}); compile the model again") from error
        model = getattr(diffusers, str(config.get("_class_name")), None)
        if model is None:
            raise LoadError(
                f"{loaded.bundle.root}: compiled from no class of diffusers, so no pipeline calls it; "
                "use tfmq_export.runtime.load"
            )
        self.loaded = loaded
        self._sample = manifest.input("sample")[0].name
        self._timestep = manifest.input("timestep")[0].name
        self._conditioning = {info.name: info.dtype for info in manifest.input("conditioning")}
        self._arguments = inspect.signature(model.forward)
        self.register_to_config(**config)

    @classmethod
    def from_pretrained(
        cls,
        root: str | Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        verify: bool = False,
        self_test: bool = True,
    ) -> "CompiledDenoiser":
        """Open a bundle; errors are those of ``tfmq_export.load``, which says more of each option.

        Args:
            root: A folder written by ``tfmq-export`` from a model of diffusers.
            backend: Engine that runs it; "auto" takes what the bundle was compiled for, if installed.
            threads: Of one inference on a CPU; None leaves the choice to the engine.
            verify: Compare every file with the manifest's hashes first.
            self_test: False saves the one call that asks this host's kernels for a stored prediction.
        """
        return cls(load(Path(root), backend=backend, threads=threads, verify=verify, self_test=self_test))

    def save_pretrained(self, *args: object, **options: object) -> None:
        """Not from here: the bundle is what is saved.

        Raises:
            ConfigError: always; says which folder to copy.
        """
        raise ConfigError(f"a compiled denoiser is saved as it is; copy the bundle {self.loaded.bundle.root}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the predictions."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the engine takes its tensors."""
        return torch.device("cpu")

    def check_schedule(self, scheduler: SchedulerMixin, steps: int | None = None) -> None:
        """Refuse a schedule that leaves the bundle's table, before any work.

        Args:
            scheduler: Of the pipeline; left as it is.
            steps: What the pipeline will be called with as ``num_inference_steps``; the bundle's own by default.
        Raises:
            TimestepError: names the timesteps that are missing.
        """
        manifest = self.loaded.bundle.manifest
        steps = steps or manifest.sampler.steps
        walked = copy.deepcopy(scheduler)
        walked.set_timesteps(steps)
        who = f"{self.loaded.bundle.root}: {type(scheduler).__name__} in {steps} steps"
        manifest.timesteps.require(walked.timesteps.numpy(force=True), who)

    def forward(self, *args: Any, return_dict: bool = True, **named: Any) -> Any:
        """Predict, with the arguments of the model's own ``forward``.

        Args:
            args: The sample, [N, C, H, W], the timestep and the rest, as the model takes them by position.
            return_dict: False gives a tuple with the prediction alone.
            named: The same by name; conditioning is [N, ...].
        Returns:
            The prediction, [N, C, H, W], on the sample's device and in its type, in the output class of the model.
        Raises:
            TimestepError: the timestep is not in the bundle's table.
            ConfigError: an argument that the compiled graph does not have, or another shape than it was compiled for.
        """
        given = self._arguments.bind(None, *args, **named).arguments
        given.pop("self")
        sample, timestep = given.pop(self._sample), given.pop(self._timestep, None)
        conditioning = {name: given.pop(name) for name in self._conditioning if given.get(name) is not None}
        for name, value in given.items():
            if value is not None and not (isinstance(value, Mapping) and not value):
                raise ConfigError(
                    f"{self.loaded.bundle.root}: cannot honour {name}: the compiled graph has no such input; "
                    "leave it out, or use the PyTorch model"
                )
        prediction = self.loaded(
            _array(sample, "float32"),
            timestep_vector(torch.as_tensor(timestep).numpy(force=True)),
            **{name: _array(value, self._conditioning[name]) for name, value in conditioning.items()},
        )
        found = torch.from_numpy(np.asarray(prediction)).to(sample.device, sample.dtype)
        if not return_dict:
            return (found,)
        if self.loaded.bundle.manifest.component == "unet":
            return UNet2DConditionOutput(sample=found)
        return Transformer2DModelOutput(sample=found)


def _array(value: Tensor, dtype: str) -> NDArray[np.generic]:
    plain = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return np.asarray(plain.numpy(force=True), dtype)
