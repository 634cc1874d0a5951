"""A model as the compiler sees it: a module, the roles of its inputs, and a way to draw images.

``Description`` is what a user's factory returns beside the module; ``Denoiser`` is the checked form
that loaders produce and every later step reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tfmq_export.bundle.call import CallInfo
from tfmq_export.bundle.manifest import SamplerInfo
from tfmq_export.capture.device import device_of
from tfmq_export.errors import ConfigError, ExportError
from tfmq_export.recipe.timesteps import TimestepSet

Conditioning = Mapping[str, Tensor]

SEEDS = 1000
"""Images of one seed begin with seeds of their own, so many apart from those of the next."""


class Denoise(Protocol):
    """One denoising step: ``denoise(sample, timestep, **conditioning) -> prediction``."""

    def __call__(self, sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
        """Predict for ``sample`` [N, ...] at one timestep: a number, a scalar tensor or [N]."""
        ...


Sampler = Callable[[Denoise, Tensor, Conditioning], Tensor]
"""Draws images: ``sampler(denoise, noise, conditioning) -> images``, all with a batch axis in front."""

Run = Callable[[Denoise], Tensor]
"""Draws some images together with whatever predicts, [N, ...]; the same ones each time."""


@runtime_checkable
class SeededSampler(Protocol):
    """Draws images that begin with a seed: a whole pipeline, or the user's own code, which make their own noise."""

    @property
    def together(self) -> int:
        """How many images one run draws at most."""
        ...

    def draw(self, denoise: Denoise, seeds: Sequence[int], *, pictures: bool = False) -> Tensor:
        """Draw an image for each seed, [N, ...].

        Args:
            pictures: As people look at them, where the model works on latents.
        """
        ...


@dataclass(frozen=True, slots=True)
class Description:
    """What a factory says about its module.

    Attributes:
        example_inputs: A tensor for each argument of ``forward``, by name, batch of 2.
        sampler: A diffusers scheduler, or the user's own ``(denoise, noise, conditioning) -> image``.
        timesteps: Every timestep the sampler visits, in order; integers, or floats for a real-valued schedule.
            May be left out with a diffusers scheduler.
        sample: Name of the argument that holds the noisy sample.
        timestep: Name of the argument that holds the timestep.
        conditioning: Real values to calibrate with, for every other argument: [examples, ...] by name.
        unconditional: The "no prompt" value of each conditioning argument, [...] by name; for guidance.
        guidance_scale: Classifier-free guidance with a diffusers scheduler; 1 turns it off.
        config: Plain data written to the bundle's config.json.
    """

    example_inputs: Mapping[str, Tensor]
    sampler: Any
    timesteps: Sequence[int] | Sequence[float] | Tensor | None = None
    sample: str = "sample"
    timestep: str = "timestep"
    conditioning: Conditioning = field(default_factory=dict)
    unconditional: Conditioning = field(default_factory=dict)
    guidance_scale: float = 1.0
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Denoiser:
    """A loaded, checked model.

    Attributes:
        module: Evaluation mode, float32, no gradients.
        example_inputs: Arguments of ``module.forward`` by name, batch of 2; sample and timestep among them.
        sample: Name of the sample argument.
        timestep: Name of the timestep argument.
        timesteps: The finite set the sampler visits.
        sampler: Draws images, guidance included: from noise that it is given, or from seeds.
        sampler_info: The same in words, for the manifest.
        conditioning: Values to calibrate with, [examples, ...] by argument name.
        unconditional: The "no prompt" value by argument name; empty where there is none.
        component: Folder of the graph in the bundle: unet, transformer or denoiser.
        config: The model's own configuration.
        scheduler_config: Of the diffusers scheduler, where there is one.
        source: Name of the file or folder it came from.
        pipeline: The pipeline folder it came from, whose other components go into the bundle.
        call: How the model's own ``forward`` is called, where ``module`` is a flat form of it.
        requests: What its pipeline was asked to draw, in plain data; images in turn.
        ragged: Axes behind the batch whose size may vary, by input name (tokens of prompts of any length).
    """

    module: nn.Module
    example_inputs: Mapping[str, Tensor]
    sample: str
    timestep: str
    timesteps: TimestepSet
    sampler: Sampler | SeededSampler
    sampler_info: SamplerInfo
    conditioning: Conditioning
    unconditional: Conditioning
    component: str
    config: Mapping[str, object]
    scheduler_config: Mapping[str, object] | None
    source: str
    pipeline: Path | None = None
    call: CallInfo | None = None
    requests: tuple[Mapping[str, object], ...] = ()
    ragged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Denoiser({self.source}: {type(self.module).__name__}, {self.timesteps.describe()})"

    def runs(self, images: int, seed: int, *, first: int | None = None, pictures: bool = False) -> tuple[Run, ...]:
        """What draws ``images`` images: one run, or several where a sampler draws fewer together.

        Args:
            seed: Of the starting noise.
            first: Only so many of the images.
            pictures: As people look at them, where the model works on latents and its pipeline can tell.
        """
        sampler, count = self.sampler, images if first is None else min(first, images)
        if isinstance(sampler, SeededSampler):
            parts = seeds_of(seed, count, sampler.together)
            return tuple(partial(sampler.draw, seeds=part, pictures=pictures) for part in parts)
        noise = self.noise(images, seed)[:count]
        prompts = {name: value[:count] for name, value in self.prompts(images).items()}
        return (lambda denoise: sampler(denoise, noise, prompts),)

    def run_together(self, images: int, seed: int) -> Run:
        """The images of ``runs`` in one run, however many they are."""
        sampler = self.sampler
        if isinstance(sampler, SeededSampler):
            (seeds,) = seeds_of(seed, images, images)
            return partial(sampler.draw, seeds=seeds)
        (run,) = self.runs(images, seed)
        return run

    def noise(self, images: int, seed: int) -> Tensor:
        """Starting noise, [images, ...]; the same for a seed on every machine."""
        shape = self.example_inputs[self.sample].shape[1:]
        return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))

    def prompts(self, images: int) -> dict[str, Tensor]:
        """Conditioning for a batch: the examples in turn, [images, ...] by name."""
        return {name: values[torch.arange(images) % len(values)] for name, values in self.conditioning.items()}

    def inputs(self, sample: Tensor, timestep: Any, conditioning: Conditioning) -> dict[str, Tensor]:
        """Arguments of ``module.forward`` by name, in the order of the example inputs.

        Raises:
            ConfigError: the sampler gave other conditioning than the module takes.
        """
        if conditioning.keys() != self.conditioning.keys():
            names = [", ".join(sorted(given)) or "nothing" for given in (conditioning, self.conditioning)]
            raise ConfigError(
                f"the sampler calls denoise with {names[0]} as conditioning, the module takes {names[1]}; "
                "pass on what the sampler was given, by name"
            )
        given = {
            self.sample: sample,
            self.timestep: self.timestep_like_example(timestep, len(sample)),
            **conditioning,
        }
        return {name: given[name] for name in self.example_inputs}

    def module_denoise(self) -> Denoise:
        """The full-precision module as a sampler calls it, wherever the module lives."""
        device = device_of(self.module)

        @torch.no_grad()
        def denoise(sample: Tensor, timestep: Any, /, **conditioning: Tensor) -> Tensor:
            given = self.inputs(sample, timestep, conditioning)
            # Contiguous, as samplers hand them in: rows that are one row repeated would stop a module that uses view().
            found = first_tensor(self.module(**{name: value.to(device).contiguous() for name, value in given.items()}))
            return found.to(sample.device)

        return denoise

    def timestep_like_example(self, timestep: Any, batch: int) -> Tensor:
        """Shape a timestep the way the module takes it: scalar, or one per sample."""
        example = self.example_inputs[self.timestep]
        value = torch.as_tensor(timestep).to(example.dtype).reshape(-1)
        if example.ndim == 0:
            return value[0]
        return value.expand(batch) if len(value) == 1 else value


def seeds_of(seed: int, images: int, together: int) -> list[list[int]]:
    """The seeds of a number of images, those that are drawn together in one list."""
    seeds = [seed * SEEDS + number for number in range(images)]
    return [seeds[start : start + together] for start in range(0, images, together)]


def row_shape(example: Tensor, ragged: Sequence[int]) -> tuple[int | None, ...]:
    """The shape of one row of an input; None for a size that may vary.

    Args:
        example: [N, ...].
        ragged: Axes that may vary beside the batch.
    """
    return tuple(None if axis in ragged else size for axis, size in enumerate(example.shape))[1:]


def first_tensor(output: Any) -> Tensor:
    """The prediction: the first tensor a module returns, alone or in tuples, lists and dicts."""
    found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise ExportError(f"forward() returns {type(output).__name__} without a tensor; return the prediction")
    return found
