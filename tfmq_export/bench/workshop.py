"""What candidates need, made once per batch size: inputs, the float graph, calls to calibrate on and to judge on."""

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bench.job import Job, SamplingJob
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime.graph_file import read_model
from tfmq_export.runtime.sampler import schedule_of
from tfmq_export.runtime.self_test import FILE as SELF_TEST

if TYPE_CHECKING:
    from tfmq_export.bench.float_model import Model
    from tfmq_export.bench.peers import Rows

CALIBRATION_SEED = 0
"""Of the trajectories that peers are calibrated with."""


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
    model: "Model | None"
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
    def given(self) -> "Model":
        """The float model.

        Raises:
            ConfigError: none was given.
        """
        if self.model is None:
            raise ConfigError("needs the model the bundle came from: --against MODEL")
        return self.model

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
        self.given.export(path, self.rows_per_call)
        return path

    @cached_property
    def rows(self) -> "Rows":
        """Recorded calls of the model, evenly over the schedule."""
        return self.given.rows(self.rows_per_call)

    @cached_property
    def held_out(self) -> Path | None:
        """Recorded calls with the float model's predictions, a file for each timestep as ``Job`` says."""
        if self.held_out_seed is None:
            return None
        folder = self.folder / "held_out"
        folder.mkdir(parents=True)
        for place, arrays in enumerate(self.given.held_out(self.held_out_seed, self.rows_per_call)):
            np.savez(folder / f"{place:04}.npz", **arrays)  # type: ignore[arg-type]
        return folder

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
        scalar = self.given.scalar_timestep
        return self.job("graph", path, threads, backend=backend, precision=precision, scalar_timestep=scalar)

    def torch_job(self, kind: str, threads: int) -> Job:
        """A job on the module itself."""
        source = self.given.fields()
        return self.job(kind, Path(source["path"]), threads, source=source)

    def float_twin(self, bundle: Bundle) -> Path:
        """The bundle with its graph computed in floating point: everything else is as in the bundle.

        Raises:
            ConfigError: its grids are part of the graph.
            DependencyError: what rewrites graphs is not installed.
        """
        try:
            from tfmq_export.passes.base import run_passes
            from tfmq_export.passes.finish.strip_qdq import StripQdq
            from tfmq_export.passes.graph import import_graph
            from tfmq_export.passes.graph_file import save_graph
        except ModuleNotFoundError as error:  # a host that only runs bundles
            raise DependencyError(
                f"it is made with {error.name}, which is not installed; pip install 'tfmq-export[bench]', or compile "
                "with --preset fp32 and give both bundles"
            ) from error
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
