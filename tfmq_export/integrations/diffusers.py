"""A bundle in the place of a denoiser in the pipelines of diffusers.

    denoiser = CompiledDenoiser.from_pretrained(OUT)
    pipeline = StableDiffusionPipeline.from_pretrained(OUT, unet=denoiser)

It takes the arguments of the class it was compiled from, and refuses those that the compiled graph does not have. It
needs torch and diffusers, as the pipelines do: ``tfmq_export.runtime`` is what runs without.
"""

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.bundle.call import LeafInfo, LeafPath, fingerprint_of, of_one_shape, written
from tfmq_export.errors import ConfigError, LoadError, first_line
from tfmq_export.recipe.plain import read_json
from tfmq_export.recipe.timesteps import TimestepSet, timestep_vector
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
            config = read_json(path)
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
        self._dtypes = {info.name: info.dtype for info in manifest.inputs}
        # Without a recorded call the arguments are called like the inputs.
        plain = tuple(LeafInfo((info.name,), info.name, 1) for info in manifest.inputs)
        self._leaves = {leaf.path: leaf for leaf in (plain if manifest.call is None else manifest.call.leaves)}
        self._lists = [leaf.input for leaf in self._leaves.values() if leaf.listed]
        self._arguments = inspect.signature(model.forward)
        self.register_to_config(**config)

    @classmethod
    def from_pretrained(
        cls,
        root: str | Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        self_test: bool = True,
    ) -> "CompiledDenoiser":
        """Open a bundle; errors are those of ``tfmq_export.load``, which says more of each option.

        Args:
            root: A folder written by ``tfmq-export`` from a model of diffusers.
            backend: Engine that runs it; "auto" takes what the bundle was compiled for, if installed.
            threads: Of one inference on a CPU; None leaves the choice to the engine.
            verify: False saves comparing its files with the manifest's hashes.
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
            ConfigError: the scheduler cannot be set to so many steps, or only its pipeline can do it.
        """
        bundle = self.loaded.bundle
        steps = steps or bundle.manifest.sampler.steps
        who = f"{bundle.root}: {type(scheduler).__name__} in {steps} steps"
        table, walked = bundle.manifest.timesteps, _walk(scheduler, steps, who)
        if bundle.manifest.call is not None and bundle.scheduler.exists():
            # Pipelines pass on what they make of the scheduler's timesteps (FLUX: a thousandth): compare with its own.
            config = read_json(bundle.scheduler)
            own = getattr(diffusers, str(config.get("_class_name")), type(scheduler)).from_config(config)
            visited = _walk(own, bundle.manifest.sampler.steps, who)
            if not np.isin(visited, table.array).all():
                table = TimestepSet.visited(visited)
        table.require(walked, who)

    def forward(self, *args: Any, return_dict: bool = True, **named: Any) -> Any:
        """Predict, with the arguments of the model's own ``forward``.

        Args:
            args: The sample, [N, C, H, W], the timestep and the rest, as the model takes them by position.
            return_dict: False gives a tuple with the prediction alone.
            named: The same by name; conditioning is [N, ...].
        Returns:
            The prediction, [N, C, H, W], on the sample's device and in its type, in the output class of the model; a
            list with a tensor for each row where the model takes such lists.
        Raises:
            TimestepError: the timestep is not in the bundle's table.
            ConfigError: an argument that the compiled graph does not have, or another shape than it was compiled for.
        """
        given = self._arguments.bind(None, *args, **named).arguments
        given.pop("self")
        values = self._inputs(given)
        lists = [*self._lists, *self._cut(values)]
        parts = [self._predict(part) for part in (_batches(values, lists) if lists else [values])]
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        answer: Any = list(found.unbind(0)) if self._lists else found
        if not return_dict:
            return (answer,)
        if self.loaded.bundle.manifest.component == "unet":
            return UNet2DConditionOutput(sample=answer)
        return Transformer2DModelOutput(sample=answer)

    def _cut(self, values: dict[str, Any]) -> list[str]:
        """Make lists of prompts without padding, by the masks among the values, which go; their names.

        Raises:
            ConfigError: the tokens of a mask do not come first.
        """
        found = []
        for path, leaf in self._leaves.items():
            mask = values.pop(written(path), None) if leaf.counts else None
            if mask is None:
                continue
            lengths = [int(length) for length in mask.sum(1).tolist()]
            if not all(bool(row[:length].all()) for row, length in zip(mask, lengths, strict=True)):
                raise ConfigError(
                    f"{self.loaded.bundle.root}: {written(path)}: padding stands between tokens; pad behind "
                    "them, or use the PyTorch model"
                )
            values[leaf.counts] = [row[:length] for row, length in zip(values[leaf.counts], lengths, strict=True)]
            found.append(leaf.counts)
        return found

    def _predict(self, values: dict[str, Any]) -> Tensor:
        sample, timestep = values.pop(self._sample), values.pop(self._timestep, None)
        rows = len(sample)
        prediction = self.loaded(
            _array(sample, self._dtypes[self._sample]),
            timestep_vector(_plain(_one_for_each(torch.as_tensor(timestep), rows))),
            **{name: _array(self._by_row(name, value, rows), self._dtypes[name]) for name, value in values.items()},
        )
        return torch.from_numpy(np.asarray(prediction)).to(sample.device, sample.dtype)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What pipelines enter around each half of guidance; nothing is cached here.

        Args:
            name: Of the half.
        """
        yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Asked for at the end of a run; there is no such cache."""

    @property
    def add_embedding(self) -> SimpleNamespace:
        """What SDXL and SVD read the width of their extra conditioning from."""
        width = self.config.get("projection_class_embeddings_input_dim")
        if width is None:
            raise AttributeError("add_embedding: the model has none")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The graph's inputs by name.

        Raises:
            ConfigError: an argument that the compiled graph does not have, or another constant than it was made with.
        """
        found = {}
        whole = {path for path, leaf in self._leaves.items() if leaf.listed}
        for path, value in _values(given, (), whole):
            leaf = self._leaves.get(path)
            if leaf is not None and (leaf.input or leaf.counts):
                if value is not None:
                    found[leaf.input or written(path)] = value
            elif leaf is None and value is not None:
                raise ConfigError(
                    f"{self.loaded.bundle.root}: cannot honour {written(path)}: the compiled graph has no such input; "
                    "leave it out, or use the PyTorch model"
                )
            elif leaf is not None and path != ("return_dict",) and fingerprint_of(_plain(value)) != leaf.constant:
                raise ConfigError(f"{self.loaded.bundle.root}: {written(path)} {_other_constant(leaf)}")
        return found

    def _by_row(self, name: str, value: Any, rows: int) -> Tensor:
        """One row for each row of the sample."""
        (leaf,) = (leaf for leaf in self._leaves.values() if leaf.input == name)
        tensor = torch.as_tensor(value)
        tensor = tensor.movedim(leaf.axis, 0) if leaf.axis else tensor
        if leaf.fold > 1 and len(tensor) == rows * leaf.fold:
            return tensor.reshape(rows, leaf.fold, *tensor.shape[1:])
        one_for_all = self.loaded.bundle.manifest.call is not None and tensor.ndim > 0 and len(tensor) == 1
        return tensor.expand(rows, *tensor.shape[1:]) if one_for_all else tensor


def _batches(values: Mapping[str, Any], lists: Collection[str]) -> Iterator[dict[str, Any]]:
    """Inputs of one shape each: neighbouring rows of the lists, and what belongs to them of the other values."""
    rows = [values[name] for name in lists]
    for part in of_one_shape(rows):
        yield {name: _part(value, part, len(rows[0]), listed=name in lists) for name, value in values.items()}


def _part(value: Any, part: slice, count: int, *, listed: bool) -> Any:
    if listed:
        return torch.stack(list(value[part]))
    return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _values(value: Any, path: LeafPath, whole: Collection[LeafPath]) -> Iterator[tuple[LeafPath, Any]]:
    """The values inside nested arguments, by their paths; ``whole`` is not looked into."""
    if path in whole:
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _values(inner, (*path, key), whole)
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _values(inner, (*path, key), whole)
    else:
        yield path, value


def _other_constant(leaf: LeafInfo) -> str:
    if leaf.constant == fingerprint_of(None):
        return (
            "was not given when the graph was compiled, which has no place for it; if it masks the padding of prompts, "
            "draw prompts of one length together or one image at a time, else use the PyTorch model"
        )
    return (
        "is another one than the graph was compiled with, which holds it as a constant; compile for this size and "
        "these settings, or use the PyTorch model"
    )


def _walk(scheduler: Any, steps: int, who: str) -> Any:
    """The timesteps of a run, [calls]; the scheduler stays as it is."""
    walked = copy.deepcopy(scheduler)
    try:
        walked.set_timesteps(steps)
    except Exception as error:  # the scheduler's own code
        raise ConfigError(f"{who}: {first_line(error)}; if its pipeline sets this, only a run of it tells") from error
    return walked.timesteps.numpy(force=True)


def _plain(value: Any) -> Any:
    """Arrays for tensors; numpy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value
    return (value.float() if value.is_floating_point() else value).numpy(force=True)


def _one_for_each(timestep: Tensor, rows: int) -> Tensor:
    """One timestep for each row, or one for all: models may take it repeated over tokens or frames."""
    if timestep.numel() <= 1 or timestep.numel() == rows:
        return timestep.reshape(-1)
    return timestep.reshape(rows, -1)[:, 0]


def _array(value: Tensor, dtype: str) -> NDArray[np.generic]:
    plain = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return np.asarray(plain.numpy(force=True), dtype)
