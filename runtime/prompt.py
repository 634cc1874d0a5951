"""A prompt, prepared once for all denoising steps.

Where a bundle has a prologue, preparing runs it: keys and values of the text, tables of what label and
timestep decide. Otherwise it only checks the conditioning. A prepared prompt is never written to, so any
number of threads may share one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import InputInfo, Manifest, PassedTensor, prologue_folder
from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.runtime.runner import Runner

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompt:
    """What the denoiser takes beside sample and timestep, read-only.

    Attributes:
        conditioning: What it was made from, [N, ...] by input name.
        feeds: Inputs of the denoiser's graph by name: [N, ...], and [T, N, ...] for tables.
        batch: N; 0 for a model without conditioning, which any batch fits.
        made_for: Identity of the bundle; others refuse it.
    """

    conditioning: Arrays
    feeds: Arrays
    batch: int
    made_for: tuple[str, ...]

    def __repr__(self) -> str:
        return f"PreparedPrompt({names_of(self.conditioning)}, batch {self.batch})"

    def is_of(self, conditioning: Arrays) -> bool:
        """Whether these arrays say the same prompt, number by number."""
        return conditioning.keys() == self.conditioning.keys() and all(
            _same(value, self.conditioning[name]) for name, value in conditioning.items()
        )


class LastPrompt:
    """The prompt of the last call, for callers that give the conditioning at every step."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._last: PreparedPrompt | None = None

    def get(self, conditioning: Arrays) -> PreparedPrompt | None:
        """The prompt, if it is the last one."""
        with self._lock:
            last = self._last
        return last if last is not None and last.is_of(conditioning) else None

    def put(self, prompt: PreparedPrompt) -> None:
        with self._lock:
            self._last = prompt


def prepare_prompt(
    manifest: Manifest, prologue: Runner | None, conditioning: Mapping[str, NDArray[np.generic]]
) -> PreparedPrompt:
    """Run the prologue, where there is one.

    Args:
        conditioning: From ``checked_conditioning``; copied.
    Raises:
        BuildError: the engine failed, or returned other tensors than the manifest promises.
    """
    kept = {name: _frozen(value.copy()) for name, value in conditioning.items()}
    batch = next((len(value) for value in kept.values()), 0)
    feeds = dict(kept)
    if manifest.prologue is not None and prologue is not None:
        info, steps = manifest.prologue, len(manifest.timesteps)
        returned = prologue.infer({name: kept[name] for name in info.reads})
        feeds = {name: kept[name] for name in info.direct}
        for tensor in info.tensors:
            shape = ((steps,) if tensor.per_timestep else ()) + (batch, *tensor.shape)
            feeds[tensor.name] = _frozen(_promised(tensor, returned.get(tensor.name), shape))
    return PreparedPrompt(MappingProxyType(kept), MappingProxyType(feeds), batch, identity_of(manifest))


def identity_of(manifest: Manifest) -> tuple[str, ...]:
    """What a prompt is bound to: model, widths, and the two graphs themselves."""
    folders = (manifest.component, prologue_folder(manifest.component))
    graphs = (manifest.files.get(f"{folder}/model.onnx", "") for folder in folders)
    return (manifest.fingerprint, manifest.preset, *graphs)


def _promised(tensor: PassedTensor, value: NDArray[np.generic] | None, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if value is None or value.shape != shape or value.dtype != np.dtype(tensor.dtype):
        got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
        raise BuildError(
            f"the prologue gave {got} for {tensor.name}, the manifest says {tensor.dtype} {list(shape)}; "
            "compile the model again"
        )
    return value


def checked_conditioning(
    manifest: Manifest, conditioning: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """Conditioning as arrays, all of one batch.

    Raises:
        ConfigError: a name, type or shape is not what the manifest says.
    """
    infos = {info.name: info for info in manifest.input("conditioning")}
    if missing := infos.keys() - conditioning.keys():
        raise ConfigError(f"missing conditioning {', '.join(sorted(missing))}; pass it by name")
    if unknown := conditioning.keys() - infos.keys():
        raise ConfigError(f"no input {', '.join(sorted(unknown))}; the conditioning here: {names_of(infos)}")
    given = {name: checked(info, conditioning[name]) for name, info in infos.items()}
    sizes = {name: len(value) for name, value in given.items()}
    for name, size in sizes.items():
        first, batch = next(iter(sizes.items()))
        if size != batch:
            raise ConfigError(f"{name}: batch of {size}, but {first} has {batch}; give one row per sample to each")
    return given


def checked(info: InputInfo, value: NDArray[np.generic]) -> NDArray[np.generic]:
    """The value as an array, if it is what the manifest asks for.

    Raises:
        ConfigError: another type or shape, an empty batch, or a number that is not finite.
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
    if array.dtype.kind == "f" and not np.isfinite(array).all():  # integer kernels would make finite numbers of it
        raise ConfigError(f"{info.name}: holds NaN or infinity; look for what made it")
    return array


def names_of(names: Iterable[str]) -> str:
    """For messages."""
    return ", ".join(sorted(names)) or "none"


def _same(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    """Bit by bit: -0.0 is not 0.0, and NaN is NaN."""
    array = np.asarray(one)
    return array.dtype == other.dtype and array.shape == other.shape and array.tobytes() == other.tobytes()


def _frozen(value: NDArray[np.generic]) -> NDArray[np.generic]:
    value.flags.writeable = False
    return value
