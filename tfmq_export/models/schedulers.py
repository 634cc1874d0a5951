"""Which diffusers scheduler walks from noise to image, and with which configuration.

A model is trained on one noise schedule; several schedulers walk it. They differ in the timesteps they visit, and those
are the rows of the bundle's tables: so the scheduler is chosen when a model is compiled.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from tfmq_export.errors import ConfigError, first_line
from tfmq_export.limits import LONGEST_SCHEDULE
from tfmq_export.recipe.plain import read_json

NAMED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
}
"""What ``--scheduler`` takes by name: a class, and options that it sets in the model's own configuration."""

OWN = "own"


def choose_scheduler(config: Mapping[str, Any], choice: str | None, where: str) -> SchedulerMixin:
    """The scheduler that draws the images.

    Args:
        config: Of the scheduler the model came with: the noise schedule it was trained on.
        choice: A key of ``NAMED``; "own" for the class that ``config`` names; the path of another
            scheduler_config.json; None for DDIM, or "own" where DDIM cannot walk what the model was trained on:
            flow matching, and schedules that are no noise schedule (consistency models, EDM).
    Raises:
        ConfigError: no such scheduler, or one that does not walk this model's schedule.
    """
    own = str(config.get("_class_name", "DDIMScheduler"))
    if choice is None:
        choice = "ddim" if not _flows(own, config) and _has_noise_schedule(own, config) else OWN
    if choice == OWN:
        return _build(own, config, where)
    if choice in NAMED:
        name, options = NAMED[choice]
        _require_walkable(config, own, name, where)
        return _build(name, {**config, **options}, where)
    path = Path(choice)
    if path.suffix != ".json":
        raise ConfigError(
            f"--scheduler {choice}: unknown; use {', '.join([*NAMED, OWN])}, or the path of a scheduler_config.json"
        )
    return _build_from_file(path)


def scheduler_config(scheduler: SchedulerMixin) -> dict[str, object]:
    """What scheduler_config.json says of a scheduler: ``choose_scheduler`` makes the same one of it."""
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return {**config, "_class_name": type(scheduler).__name__}


def _require_walkable(config: Mapping[str, Any], own: str, name: str, where: str) -> None:
    """Refuse to walk a noise schedule by flow matching, or the other way round."""
    if _flows(own, config):
        if not name.startswith("FlowMatch"):
            raise ConfigError(f"{where}: trained by flow matching ({own}), which {name} cannot walk; use own or flow")
    elif name.startswith("FlowMatch"):
        raise ConfigError(f"{where}: trained on a noise schedule ({own}), not by flow matching; use ddim or another")
    elif not _has_noise_schedule(own, config):
        raise ConfigError(
            f"{where}: {own} has no noise schedule that {name} can walk (betas, one per timestep); use --scheduler "
            "own, or pass a sampler with --factory"
        )


def _flows(name: str, config: Mapping[str, Any]) -> bool:
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def _has_noise_schedule(own: str, config: Mapping[str, Any]) -> bool:
    """Whether there are betas, one per discrete timestep; consistency, EDM and continuous schedules have none."""
    if config.get("timestep_type") == "continuous":
        return False
    if {"beta_schedule", "trained_betas"} & config.keys():
        return True
    known = getattr(diffusers, own, None)
    return known is not None and "beta_schedule" in inspect.signature(known.__init__).parameters


def _build_from_file(path: Path) -> SchedulerMixin:
    try:
        config = read_json(path)
        name = config["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--scheduler {path}: not a readable scheduler configuration: {error!r}") from error
    return _build(str(name), config, str(path))


def _build(name: str, config: Mapping[str, Any], where: str) -> SchedulerMixin:
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ConfigError(f"{where}: diffusers {diffusers.__version__} has no scheduler {name!r}; choose --scheduler")
    known: Any = found
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 1 <= count <= LONGEST_SCHEDULE:
        raise ConfigError(f"{where}: num_train_timesteps of {str(count)[:40]}; give 1 to {LONGEST_SCHEDULE}")
    try:
        return known.from_config(dict(config))
    except Exception as error:  # the class's own reading of its configuration
        raise ConfigError(f"{where}: {name} cannot run this scheduler configuration: {first_line(error)}") from error
