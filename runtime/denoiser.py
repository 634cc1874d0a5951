"""A bundle opened as a function: ``load(root)(sample, timestep, **conditioning) -> prediction``.

Requests are checked against the manifest before the engine sees them, so that a bad one costs
nothing, names what is wrong, and leaves the engine as it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle import Bundle, InputInfo, open_bundle
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.runtime.engines import open_runner
from tfmq_export.runtime.runner import Runner


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle and the engine that runs it."""

    bundle: Bundle
    runner: Runner

    def __post_init__(self) -> None:
        for role in ("sample", "timestep"):
            if len(self.bundle.manifest.input(role)) != 1:
                raise LoadError(f"{self.bundle.root}: the manifest needs one {role} input; compile the model again")

    def __call__(
        self,
        sample: NDArray[np.generic],
        timestep: int | float | NDArray[np.generic],
        /,
        **conditioning: NDArray[np.generic],
    ) -> NDArray[np.generic]:
        """Predict.

        Args:
            sample: [N, ...].
            timestep: One for the batch (a number, [] or [1]), or one per sample, [N].
            conditioning: [N, ...] under each input's name.
        Raises:
            TimestepError: the timestep is not in the bundle's schedule.
            ConfigError: a name, type or shape is not what the manifest says.
        """
        manifest = self.bundle.manifest
        (sample_info,) = manifest.input("sample")
        (timestep_info,) = manifest.input("timestep")
        infos = {info.name: info for info in manifest.input("conditioning")}
        if missing := infos.keys() - conditioning.keys():
            raise ConfigError(f"missing conditioning {', '.join(sorted(missing))}; pass it by name")
        if unknown := conditioning.keys() - infos.keys():
            raise ConfigError(f"no input {', '.join(sorted(unknown))}; the conditioning here: {_names(infos)}")

        feeds = {sample_info.name: checked(sample_info, sample)}
        batch = feeds[sample_info.name].shape[0]
        for name, info in infos.items():
            feeds[name] = checked(info, conditioning[name])
            if feeds[name].shape[0] != batch:
                raise ConfigError(
                    f"{name}: batch of {feeds[name].shape[0]}, but {sample_info.name} has {batch}; "
                    "give one row per sample"
                )
        steps = timesteps_of(timestep, batch)
        manifest.timesteps.rows(steps)
        feeds[timestep_info.name] = steps.astype(timestep_info.dtype)
        return self.runner.infer(feeds)[manifest.output]

    def __enter__(self) -> Self:
        self.runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, traceback)


def load(
    root: Path, *, backend: str = "auto", threads: int | None = None, integer: bool = True, verify: bool = False
) -> LoadedBundle:
    """Open a bundle on the CPU.

    Args:
        backend: "onnxruntime", "openvino", or "auto": the engine the bundle was compiled for where it is installed,
            else ONNX Runtime.
        threads: Of one inference; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
        verify: Compare every file with the manifest's hashes first.
    Raises:
        LoadError: no bundle, an altered file, or a graph that is not the manifest's.
        BuildError: the engine refuses the graph.
        DependencyError: the engine is not installed.
    """
    bundle = open_bundle(Path(root))
    if verify:
        bundle.verify()
    runner = open_runner(bundle, backend, threads=threads, integer=integer)
    promised = {info.name for info in bundle.manifest.inputs}
    if promised != set(runner.inputs) or bundle.manifest.output not in runner.outputs:
        raise LoadError(
            f"{bundle.model}: takes {_names(runner.inputs)} and gives {_names(runner.outputs)}, the manifest says "
            f"{_names(promised)} and {bundle.manifest.output}; compile the model again"
        )
    return LoadedBundle(bundle, runner)


def checked(info: InputInfo, value: NDArray[np.generic]) -> NDArray[np.generic]:
    """The value as an array, if it is what the manifest asks for.

    Raises:
        ConfigError: another type or shape, or an empty batch.
    """
    array = np.asarray(value)
    if array.dtype != np.dtype(info.dtype):
        raise ConfigError(f"{info.name}: {array.dtype}, needs {info.dtype}; convert it with .astype({info.dtype!r})")
    given = array.shape[1:]
    fits = array.ndim == len(info.shape) + 1 and all(
        want is None or size == want for size, want in zip(given, info.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(["batch", *("any" if size is None else str(size) for size in info.shape)])
        raise ConfigError(f"{info.name}: shape {list(array.shape)}, needs [{wanted}]")
    if array.shape[0] == 0:
        raise ConfigError(f"{info.name}: the batch is empty; give at least one sample")
    return array


def timesteps_of(timestep: int | float | NDArray[np.generic], batch: int) -> NDArray[np.generic]:
    """The timestep as a vector, [1] or [batch].

    Raises:
        ConfigError: not a number, or neither one nor one per sample.
    """
    array = np.asarray(timestep)
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"timestep: must be a number, got {array.dtype}")
    if array.ndim > 1 or array.size not in (1, batch):
        raise ConfigError(f"timestep: shape {list(array.shape)}; give one for the batch, or [{batch}]")
    return array.reshape(-1)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
