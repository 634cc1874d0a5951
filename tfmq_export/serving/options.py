"""How a bundle is served."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tfmq_export.errors import ConfigError
from tfmq_export.target import Target, find_target

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
CAPABILITY = re.compile(r"\d+\.\d")
EVERY_GPU = ""
"""Key of an engine that is not tied to a compute capability."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model runs on the server; they are in its ``config.pbtxt``.

    Attributes:
        max_batch: Most samples of one inference, over all requests that are joined; no more than an engine's profile.
        instances: Copies that run at the same time, per GPU where it runs on GPUs.
        threads: Of each instance on a CPU; 0 takes all cores.
        gpus: Numbers of the GPUs to use; none for all.
        queue_delay_us: How long a request may wait for others to join it, in microseconds.
        keep_versions: How many versions the server keeps loaded, from the newest.
    """

    max_batch: int = 8
    instances: int = 1
    threads: int = 0
    gpus: tuple[int, ...] = ()
    queue_delay_us: int = 500
    keep_versions: int = 2

    def __post_init__(self) -> None:
        for what in ("max_batch", "instances", "keep_versions"):
            if getattr(self, what) < 1:
                raise ConfigError(f"{what} {getattr(self, what)}: at least 1")
        for what in ("threads", "queue_delay_us"):
            if getattr(self, what) < 0:
                raise ConfigError(f"{what} {getattr(self, what)}: at least 0")
        if len(set(self.gpus)) != len(self.gpus) or any(number < 0 for number in self.gpus):
            raise ConfigError(f"gpus {list(self.gpus)}: each number once, from 0")

    @property
    def preferred_batches(self) -> tuple[int, ...]:
        """Sizes that a batch is sent off at without waiting: powers of two, and the largest."""
        powers = {1 << power for power in range(1, self.max_batch.bit_length())}
        return tuple(sorted(powers | {self.max_batch} - {1}))


@dataclass(frozen=True, slots=True)
class Serving:
    """What is asked of a server beside the graph's own tensors.

    Attributes:
        name: Of the model on the server.
        version: None for one more than the highest there is.
        max_batch: As in ``Settings``, like the five below; None keeps what the model has, else takes the usual.
        engines: TensorRT plan files by compute capability such as "8.9", or one under ``EVERY_GPU``.
        prologue_engines: The same for the prologue.
    """

    name: str
    version: int | None = None
    max_batch: int | None = None
    instances: int | None = None
    threads: int | None = None
    gpus: tuple[int, ...] | None = None
    queue_delay_us: int | None = None
    keep_versions: int | None = None
    engines: Mapping[str, Path] = field(default_factory=dict)
    prologue_engines: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"model name {self.name!r}: use letters, digits, '_', '.' and '-', as for a folder")
        if self.version is not None and self.version < 1:
            raise ConfigError(f"model version {self.version}: at least 1")
        replace(Settings(), **self.given)
        for engines in (self.engines, self.prologue_engines):
            _check_engines(engines)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were asked for, by name."""
        asked = {each.name: getattr(self, each.name) for each in fields(Settings)}
        return {name: value for name, value in asked.items() if value is not None}


def _check_engines(engines: Mapping[str, Path]) -> None:
    for capability, path in engines.items():
        if capability != EVERY_GPU and not CAPABILITY.fullmatch(capability):
            raise ConfigError(f"compute capability {capability!r} of {path}: write it as 8.9")
        if not path.is_file():
            raise ConfigError(f"{path}: no such engine; build it with TensorRT on the GPU that serves it")
    if EVERY_GPU in engines and len(engines) > 1:
        raise ConfigError("engines: either one for every GPU, or each with its compute capability, such as 8.9=PATH")


def needs_gpu(target: Target) -> bool:
    """Whether a target's graphs run on GPUs."""
    return target.engine == "tensorrt" or not target.integers


def require_servable(target: str, serving: Serving) -> None:
    """Refuse what no backend of the server loads, before hours of compiling.

    Raises:
        ConfigError: says which backend would be asked, and what it lacks.
    """
    if target == "tensorrt-rtx":
        raise ConfigError("target tensorrt-rtx: Triton has no backend for its engines; compile with --target tensorrt")
    if target == "qnn":
        raise ConfigError("target qnn: Triton has no backend for phones; compile with --target ort-cpu")
    planned = find_target(target).engine == "tensorrt"
    if planned and not serving.engines:
        raise ConfigError(
            f"target {target}: Triton's TensorRT backend loads engines; build one on the GPU that serves it "
            "(docs/serving.md has the command) and name it with --engine"
        )
    if not planned and (serving.engines or serving.prologue_engines):
        raise ConfigError(f"target {target}: its graph runs in ONNX Runtime; engines belong to --target tensorrt")


def require_fitting(target: str, settings: Settings) -> None:
    """Refuse settings that are not for a target's hardware.

    Raises:
        ConfigError: says which.
    """
    gpu = needs_gpu(find_target(target))
    if settings.gpus and not gpu:
        raise ConfigError(f"target {target} runs on CPUs; leave the GPUs out, or compile for ort-cuda or tensorrt")
    if gpu and settings.threads:
        raise ConfigError(f"target {target} runs on GPUs; leave the threads out")
    if not gpu and settings.instances > 1 and not settings.threads:
        raise ConfigError(
            f"{settings.instances} instances with all cores each would slow each other; "
            "give each its --threads, such as the cores divided by the instances"
        )
