"""What candidates need, made once per batch size: inputs, the float graph, calls to calibrate on and to judge on."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bench.job import PREDICTION, Job, SamplingJob
from tfmq_export.bench.peers import Rows, batches_of, export_float
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import capture
from tfmq_export.errors import ConfigError, RecipeError
from tfmq_export.models.load import Source, load
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import import_graph
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate
from tfmq_export.runtime.graph_file import read_model
from tfmq_export.runtime.sampler import schedule_of
from tfmq_export.runtime.self_test import FILE as SELF_TEST

T = TypeVar("T")
IMAGES = 4
"""Trajectories that peers are calibrated with, and as many to judge on."""
CALIBRATION_SEED = 0
CALIBRATION_ROWS = 32
"""Calls that peers are calibrated with, spread over the schedule."""
HELD_OUT_STEPS = 16
"""Timesteps that predictions are judged at, likewise."""


@dataclass(frozen=True)
class Model:
    """The float model behind the bundles, loaded when something asks for it."""

    source: Source

    @cached_property
    def denoiser(self) -> Denoiser:
        return load(self.source)

    @cached_property
    def fingerprint(self) -> str:
        return capture(self.denoiser).fingerprint

    def require_origin_of(self, bundle: Bundle) -> None:
        """Raise RecipeError if the bundle was compiled from another model."""
        if self.fingerprint != bundle.manifest.fingerprint:
            raise RecipeError(f"{bundle.root} was not compiled from {self.source.path}; give the model it came from")


@dataclass(frozen=True)
class Workshop:
    """Makes jobs for one batch size.

    Attributes:
        bundle: Whose sampler and prompts the inputs are.
        folder: Takes what is made.
        batch: Samples per call, or images per sampling run.
        sampling: Whether whole runs are timed.
        held_out_seed: Of the trajectories that predictions are judged on; None judges nothing.
    """

    bundle: Bundle
    model: Model | None
    folder: Path
    batch: int
    sampling: bool
    held_out_seed: int | None = None

    @cached_property
    def guidance_scale(self) -> float:
        """As the bundle samples; 1 where no call has two halves."""
        stored, scale = self.bundle.conditioning(), self.bundle.manifest.sampler.guidance_scale
        return scale if any(name.endswith(".unconditional") for name in stored) else 1.0

    @property
    def rows_per_call(self) -> int:
        """Samples in one call of the model: under guidance, twice the images."""
        return self.batch * (2 if self.sampling and self.guidance_scale != 1 else 1)

    @property
    def denoiser(self) -> Denoiser:
        """The float model.

        Raises:
            ConfigError: none was given.
        """
        if self.model is None:
            raise ConfigError("needs the model the bundle came from: --against MODEL")
        return self.model.denoiser

    @cached_property
    def inputs(self) -> Path:
        """Noise, the first timestep of the schedule, stored prompts in turn; the same for every candidate."""
        manifest, stored = self.bundle.manifest, self.bundle.conditioning()
        arrays: dict[str, NDArray[Any]] = {}
        for info in manifest.inputs:
            if info.role == "sample":
                shape = (self.batch, *(size or 1 for size in info.shape))
                arrays[info.name] = np.random.default_rng(0).standard_normal(shape, np.float32)
            elif info.role == "timestep":
                arrays[info.name] = manifest.timesteps.array[:1].astype(info.dtype)
            else:
                values = stored[info.name]
                arrays[info.name] = values[np.arange(self.batch) % len(values)]
        arrays |= {name: value for name, value in stored.items() if name.endswith(".unconditional")}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "inputs.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return path

    @cached_property
    def float_graph(self) -> Path:
        """The model as torch exports it, for calls of this size."""
        path = self.folder / "float" / "model.onnx"
        export_float(self.denoiser, path, self.rows_per_call)
        return path

    @cached_property
    def rows(self) -> Rows:
        """Recorded calls of the model, evenly over the schedule."""
        steps = self._recorded(CALIBRATION_SEED)
        return spread([call for step in steps for call in batches_of(step, self.rows_per_call)], CALIBRATION_ROWS)

    @cached_property
    def held_out(self) -> Path | None:
        """Recorded calls with the float model's predictions, a file for each timestep as ``Job`` says."""
        if self.held_out_seed is None:
            return None
        steps = spread(self._recorded(self.held_out_seed), HELD_OUT_STEPS)
        folder = self.folder / "held_out"
        folder.mkdir(parents=True)
        for place, step in enumerate(steps):
            np.savez(folder / f"{place:04}.npz", **held_out_calls(step, self.rows_per_call))  # type: ignore[arg-type]
        return folder

    def _recorded(self, seed: int) -> Sequence[CalibrationStep]:
        images = -(-IMAGES // self.rows_per_call) * self.rows_per_call
        return calibrate(self.denoiser, images=images, seed=seed, progress=lambda done, total: None)

    def job(self, kind: str, path: Path, threads: int, **settings: Any) -> Job:
        """A job on this workshop's inputs."""
        manifest = self.bundle.manifest
        (sample,), (timestep,) = manifest.input("sample"), manifest.input("timestep")
        return Job(
            kind=kind,
            path=str(path.absolute()),
            inputs=str(self.inputs.absolute()),
            sample=sample.name,
            timestep=timestep.name,
            threads=threads,
            sampling=self._sampling_job() if self.sampling else None,
            held_out=None if self.held_out is None else str(self.held_out.absolute()),
            **settings,
        )

    def graph_job(self, path: Path, threads: int, backend: str, precision: str = "f32") -> Job:
        """A job on a graph that takes the module's inputs."""
        scalar = self.denoiser.example_inputs[self.denoiser.timestep].ndim == 0
        return self.job("graph", path, threads, backend=backend, precision=precision, scalar_timestep=scalar)

    def torch_job(self, kind: str, threads: int) -> Job:
        """A job on the module itself."""
        if self.model is None:
            raise ConfigError("needs the model the bundle came from: --against MODEL")
        source = self.model.source
        return self.job(kind, source.path, threads, source=_plain(source))

    def float_twin(self, bundle: Bundle) -> Path:
        """The bundle with its graph computed in floating point: everything else is as in the bundle.

        Raises:
            ConfigError: its grids are part of the graph.
        """
        if any(item.name == "LowerTimestepGrids" and item.changed for item in bundle.manifest.passes):
            raise ConfigError("it has none, because its grids per timestep are part of the graph")
        if (folder := self._twins.get(bundle.root)) is not None:
            return folder
        main, *_ = (read_model(path, weights=path == bundle.model) for path in bundle.graphs)  # refused before a copy
        folder = self.folder / "twins" / f"{len(self._twins)}"
        # Not the components of a pipeline, which may be gigabytes.
        for part in (bundle.root / "tfmq", *(graph.parent for graph in bundle.graphs)):
            shutil.copytree(part, folder / part.name)
        graph = import_graph(main)
        run_passes(graph, [StripQdq()])
        save_graph(graph, folder / bundle.model.relative_to(bundle.root))
        # The self-test asks for the bundle's integers.
        files = {name: digest for name, digest in bundle.manifest.files.items() if name != SELF_TEST}
        twin = Bundle(folder, replace(bundle.manifest, files=files))
        twin.extended([bundle.model.relative_to(bundle.root).as_posix()])
        self._twins[bundle.root] = folder
        return folder

    @cached_property
    def _twins(self) -> dict[Path, Path]:
        """Those that were made, by the bundle's folder."""
        return {}

    def _sampling_job(self) -> SamplingJob:
        if schedule_of(self.bundle) is None:
            kind = self.bundle.manifest.sampler.kind
            raise ConfigError(f"{self.bundle.root}: sampled with {kind}; whole runs are timed with linear ones only")
        return SamplingJob(str(self.bundle.root.absolute()), self.guidance_scale)


def held_out_calls(step: CalibrationStep, batch: int) -> dict[str, NDArray[Any]]:
    """One timestep of a trajectory as calls of this size, beside what the float model predicts."""
    calls = batches_of(step, batch)
    arrays = {name: np.stack([call[name] for call in calls]) for name in step.inputs}
    return {**arrays, PREDICTION: step.prediction[: len(calls) * batch].numpy()}


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly over all, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[index] for index in kept]


def _plain(source: Source) -> dict[str, Any]:
    """Its fields as JSON takes them, valid from any working directory."""
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in asdict(source).items()}
