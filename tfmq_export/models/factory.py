"""Any ``nn.Module``: the user's factory returns it with a ``Description`` of its inputs."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from tfmq_export.bundle.manifest import SamplerInfo
from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser, Description, Sampler
from tfmq_export.capture.place import theirs
from tfmq_export.errors import ConfigError, LoadError, TfmqError
from tfmq_export.models.layouts.foreign import refuse_file, refuse_quantized
from tfmq_export.models.layouts.states import INDEX, fit, read_state
from tfmq_export.models.prompts import effective_scale
from tfmq_export.models.recorded.load import Draw, denoiser_from_draw
from tfmq_export.models.schedulers import scheduler_config
from tfmq_export.models.single_precision import in_single_precision
from tfmq_export.models.unwrapped import unwrapped
from tfmq_export.models.walk import DiffusersSampler, require_finite_walk
from tfmq_export.models.weights import load_weights
from tfmq_export.recipe.timesteps import TimestepSet


def load_factory(reference: str, weights: Path | None, steps: int | None, *, raw: bool = False) -> Denoiser:
    """Call ``package.module:build``, and load the weights unless it has done so itself.

    The factory is the user's own code, named by the user; the weights are read as plain tensors.

    Raises:
        ConfigError: the reference names no function that builds a model.
        LoadError: it raises, or what it returned, or the weights, cannot be used.
    """
    factory = _find_factory(reference)
    try:
        built = factory()
    except Exception as error:  # the user's own code, which may raise anything
        raise LoadError(f"--factory {reference}: it raises {theirs(error)}") from error
    require_pair(built, f"--factory {reference}: must return")
    if weights is None:
        return denoiser_from_code(built, steps, where=reference)
    if not weights.is_file():
        raise LoadError(f"{weights}: no such file; --factory takes a state_dict (.pt or .safetensors)")
    if not INDEX.fullmatch(weights.name):
        refuse_file(weights)
    state = read_state(weights, raw=raw)
    refuse_quantized(state.types(), weights)
    module = unwrapped(built[0], f"--factory {reference}")
    tensors, notes = fit(state.tensors, module.state_dict().keys(), raw=raw)
    load_weights(module, {name: tensors[name] for name in tensors}, weights)
    noted = "; ".join((*state.notes, *notes))
    return denoiser_from_code((module, built[1]), steps, where=f"{weights.name} ({noted})" if noted else weights.name)


def _find_factory(reference: str) -> Callable[[], Any]:
    """The function of that name, if it is Python code that can be called with nothing."""
    name, _, attribute = reference.partition(":")
    if not attribute or not name.strip("."):
        raise ConfigError(f"--factory {reference}: expected package.module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for good: what it returns may import more when it runs
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--factory {reference}: {theirs(error)}; run from the folder that holds it") from error
    except Exception as error:  # the user's own code, which may raise anything
        raise LoadError(f"--factory {reference}: importing {name} raises {theirs(error)}") from error
    try:
        builds = callable(factory) and not inspect.isbuiltin(factory) and inspect.signature(factory).bind() is not None
    except (TypeError, ValueError):  # it wants arguments, or has no signature
        builds = False
    if not builds:
        raise ConfigError(
            f"--factory {reference}: not a function that builds a model; write one without arguments that returns "
            "(module, draw), or (module, tfmq_export.Description)"
        )
    return cast("Callable[[], Any]", factory)


@dataclass(frozen=True, slots=True)
class OwnSampler:
    """The user's sampler, ``(denoise, noise, conditioning) -> images``; what it raises is told as its own."""

    code: Sampler
    where: str

    def __call__(self, denoise: Denoise, noise: Tensor, conditioning: Conditioning, /) -> Tensor:
        try:
            return self.code(denoise, noise, conditioning)
        except TfmqError:
            raise
        except Exception as error:  # the user's own code, which may raise anything
            raise LoadError(f"{self.where}: the sampler raises {theirs(error)}") from error


def require_pair(built: Any, what: str) -> None:
    """Refuse what is no module with the code or the description that belongs to it.

    Raises:
        LoadError: says what is expected.
    """
    pair = isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)
    if not pair or not (isinstance(built[1], Description) or callable(built[1])):
        raise LoadError(
            f"{what} (module, draw), where draw(seed) returns an image, or (module, tfmq_export.Description)"
        )


def denoiser_from_code(built: tuple[nn.Module, Description | Draw], steps: int | None, where: str) -> Denoiser:
    """A module with the code that draws with it, or with a description of its inputs.

    Raises:
        LoadError, ConfigError: one of the two cannot be used; says which and why.
    """
    require_pair(built, "expected")
    module, rest = unwrapped(built[0], where), built[1]
    if isinstance(rest, Description):
        return describe(module, rest, steps, source=where)
    return denoiser_from_draw(module, rest, steps, where)


def describe(module: nn.Module, description: Description, steps: int | None, source: str) -> Denoiser:
    """Check a module's description and complete it.

    Raises:
        ConfigError: a field that contradicts the others; says which.
    """
    if not isinstance(description, Description):
        names = ", ".join(field.name for field in fields(Description))
        raise ConfigError(f"expected a tfmq_export.Description ({names}), got {type(description).__name__}")
    inputs = dict(description.example_inputs)
    for role, name in (("sample", description.sample), ("timestep", description.timestep)):
        if name not in inputs:
            raise ConfigError(f"Description.{role} is {name!r}, but example_inputs has {', '.join(inputs)}")
    if len(inputs[description.sample]) != 2:
        raise ConfigError("Description.example_inputs needs a batch of 2: a batch of 1 would be taken for a constant")
    if inputs[description.timestep].shape not in ((), (2,)):
        raise ConfigError(
            f"the example timestep has shape {list(inputs[description.timestep].shape)}; "
            "let forward() take one number, [], or one per sample, [batch]"
        )
    _require_named(module, inputs)
    others = set(inputs) - {description.sample, description.timestep}
    if missing := others - set(description.conditioning):
        raise ConfigError(
            f"Description.conditioning has no examples of {', '.join(sorted(missing))}; calibration needs real values"
        )
    if strange := set(description.conditioning) - others:
        raise ConfigError(f"Description.conditioning names {', '.join(sorted(strange))}, not among example_inputs")
    _check_conditioning(description, inputs)
    timesteps, sampler, info, scheduler = _sampler(description, steps, source)
    if timesteps.real != inputs[description.timestep].is_floating_point():
        kinds = ("float", "integer") if timesteps.real else ("integer", "float")
        raise ConfigError(f"the schedule has {kinds[0]} timesteps, but the example timestep is {kinds[1]}")
    return Denoiser(
        module=in_single_precision(module),
        example_inputs=inputs,
        sample=description.sample,
        timestep=description.timestep,
        timesteps=timesteps,
        sampler=sampler,
        sampler_info=info,
        conditioning=description.conditioning,
        unconditional=description.unconditional,
        component="denoiser",
        config=dict(description.config),
        scheduler_config=scheduler,
        source=source,
    )


def _require_named(module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs that are not in the signature of ``forward``: torch.export cannot follow ``**kwargs``."""
    known = inspect.signature(module.forward).parameters
    unnamed = [name for name in inputs if name not in known]
    caught = next((name for name, each in known.items() if each.kind is inspect.Parameter.VAR_KEYWORD), None)
    if unnamed and caught is not None:
        raise ConfigError(
            f"{type(module).__name__}.forward() takes {', '.join(unnamed)} through **{caught}, which torch.export "
            "cannot follow; name each input in its signature"
        )


def _check_conditioning(description: Description, inputs: Mapping[str, Tensor]) -> None:
    for name, values in description.conditioning.items():
        example = inputs[name]
        if len(example) != len(inputs[description.sample]):
            raise ConfigError(f"Description.example_inputs: {name} has a batch of {len(example)}, the sample of 2")
        if values.dtype != example.dtype or values.shape[1:] != example.shape[1:]:
            kinds = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (values, example)]
            raise ConfigError(f"Description.conditioning of {name} is {kinds[0]}, its example input {kinds[1]}")
    for name, value in description.unconditional.items():
        if name not in description.conditioning:
            raise ConfigError(f"Description.unconditional names {name}, not among the conditioning")
        wanted = description.conditioning[name].shape[1:]
        if value.shape != wanted:
            raise ConfigError(
                f"Description.unconditional value of {name} is {list(value.shape)}, needs {list(wanted)}: no batch axis"
            )


def _sampler(
    description: Description, steps: int | None, source: str
) -> tuple[TimestepSet, Any, SamplerInfo, dict[str, object] | None]:
    given = description.sampler
    listed = None if description.timesteps is None else TimestepSet.of(torch.as_tensor(description.timesteps).numpy())
    if isinstance(given, SchedulerMixin):
        wanted = steps or (len(listed) if listed is not None else 50)
        scale = effective_scale(
            description.guidance_scale, description.unconditional, description.conditioning, "Description"
        )
        sampler = DiffusersSampler(given, wanted, description.unconditional, scale)
        require_finite_walk(sampler)
        timesteps = sampler.timesteps
        if torch.as_tensor(description.example_inputs[description.timestep]).is_floating_point():
            timesteps = TimestepSet.of(timesteps.array.astype(np.float32))
        if listed is not None and set(listed.values) != set(timesteps.values):
            raise ConfigError(
                f"Description.timesteps ({listed.describe()}) are not the ones "
                f"{type(given).__name__} visits in {wanted} steps ({timesteps.describe()}); leave them out"
            )
        return timesteps, sampler, SamplerInfo(type(given).__name__, wanted, scale), scheduler_config(given)
    if not callable(given):
        raise ConfigError(
            "Description.sampler must be a diffusers scheduler or (denoise, noise, conditioning) -> image"
        )
    if listed is None:
        raise ConfigError("Description.timesteps is needed with your own sampler: every timestep it visits, in order")
    if steps is not None and steps != len(listed):
        raise ConfigError(f"--steps {steps}, but your own sampler's schedule has {len(listed)} timesteps")
    return listed, OwnSampler(given, source), SamplerInfo("function", len(listed)), None
