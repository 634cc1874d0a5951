"""A bundle opened as a function: ``load(root)(sample, timestep, **conditioning) -> prediction``.

With ``prompt = loaded.prepare(**conditioning)`` and ``loaded(sample, timestep, prompt=prompt)``, what the
prompt decides is computed once.

Requests are checked against the manifest before the engine sees them, so that a bad one costs
nothing, names what is wrong, and leaves the engine as it was.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, InputInfo, open_bundle, table_html
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.recipe.timesteps import timestep_vector
from tfmq_export.runtime.engines.open import open_graph
from tfmq_export.runtime.prompt import (
    Arrays,
    LastPrompt,
    PreparedPrompt,
    checked,
    checked_conditioning,
    identity_of,
    names_of,
    prepare_prompt,
)
from tfmq_export.runtime.runner import BuiltForBatches, Runner
from tfmq_export.runtime.self_test import HostCheck, check_host, read_self_test, require_host


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle and the engine that runs it.

    Attributes:
        prologue: Runs the bundle's second graph, where it has one.
        last: The prompt of the last call with conditioning; behind a lock.
        sample_and_timestep: What the manifest says of these two inputs.
    """

    bundle: Bundle
    runner: Runner
    prologue: Runner | None = None
    last: LastPrompt = field(default_factory=LastPrompt, compare=False, repr=False)
    sample_and_timestep: tuple[InputInfo, InputInfo] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        (sample,), (timestep,) = (self.bundle.manifest.input(role) for role in ("sample", "timestep"))
        object.__setattr__(self, "sample_and_timestep", (sample, timestep))

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        return f"LoadedBundle({str(self.bundle.root)!r}, {manifest.preset} for {manifest.target}, {self.engine})"

    @property
    def engine(self) -> str:
        """What runs it, with its version and what it computes in, for reports."""
        return self.runner.engine

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return table_html({**self.bundle.described(), "engine": self.engine})

    def prepare(self, **conditioning: NDArray[np.generic]) -> PreparedPrompt:
        """Do once what the prompt decides; give the result to each call as ``prompt``.

        Args:
            conditioning: [N, ...] under each input's name.
        Raises:
            ConfigError: a name, type or shape is not what the manifest says.
        """
        manifest = self.bundle.manifest
        return prepare_prompt(manifest, self.prologue, checked_conditioning(manifest, conditioning))

    def __call__(
        self,
        sample: NDArray[np.generic],
        timestep: int | float | NDArray[np.generic],
        /,
        *,
        prompt: PreparedPrompt | NDArray[np.generic] | None = None,
        **conditioning: NDArray[np.generic],
    ) -> NDArray[np.generic]:
        """Predict.

        Args:
            sample: [N, ...].
            timestep: One for the batch (a number, [] or [1]), or one per sample, [N].
            prompt: From ``prepare``, in place of the conditioning. (A model may have an input of this name; then it
                takes that input's array.)
            conditioning: [N, ...] under each input's name; prepared here, unless it is that of the last call.
        Raises:
            TimestepError: the timestep is not in the bundle's schedule.
            ConfigError: a name, type or shape is not what the manifest says, or the prompt was prepared for another
                bundle or batch.
        """
        manifest, (sample_info, timestep_info) = self.bundle.manifest, self.sample_and_timestep
        feeds = {sample_info.name: checked(sample_info, sample)}
        batch = feeds[sample_info.name].shape[0]
        steps = timestep_vector(timesteps_of(timestep, batch))
        manifest.timesteps.rows(steps)
        feeds[timestep_info.name] = steps.astype(timestep_info.dtype)
        if isinstance(prompt, PreparedPrompt):
            feeds |= self._feeds_of(prompt, batch, conditioning)
        else:
            named = conditioning if prompt is None else {**conditioning, "prompt": prompt}
            feeds |= self._feeds_from(named, batch, sample_info.name)
        return self.runner.infer(feeds)[manifest.output]

    def _feeds_of(self, prompt: PreparedPrompt, batch: int, conditioning: Arrays) -> Arrays:
        if conditioning:
            raise ConfigError(f"both a prepared prompt and {names_of(conditioning)}; give one of the two")
        if prompt.made_for != identity_of(self.bundle.manifest):
            raise ConfigError(
                f"the prompt was prepared by another bundle than {self.bundle.root}; prepare it with this one"
            )
        if prompt.conditioning and prompt.batch != batch:
            raise ConfigError(
                f"the prompt was prepared for a batch of {prompt.batch}, the sample has {batch}; "
                "prepare one row per sample"
            )
        return prompt.feeds

    def _feeds_from(self, conditioning: Arrays, batch: int, sample: str) -> Arrays:
        given = checked_conditioning(self.bundle.manifest, conditioning)
        for name, value in given.items():
            if len(value) != batch:
                raise ConfigError(f"{name}: batch of {len(value)}, but {sample} has {batch}; give one row per sample")
        if self.prologue is None:
            return given
        prompt = self.last.get(given)
        if prompt is None:
            prompt = prepare_prompt(self.bundle.manifest, self.prologue, given)
            self.last.put(prompt)
        return prompt.feeds

    def check_host(self) -> HostCheck | None:
        """Ask the engine for the prediction that the bundle brings along; None where it brings none.

        Raises:
            LoadError: the stored prediction is missing or altered.
        """
        test = read_self_test(self.bundle)
        if test is None:
            return None
        sample, timestep = (info.name for info in self.sample_and_timestep)
        rows = self.runner.smallest_batch(sample) if isinstance(self.runner, BuiltForBatches) else 1

        def predict(inputs: Arrays) -> NDArray[np.generic]:
            given = {name: value.repeat(rows, 0) for name, value in inputs.items() if name != timestep}
            return self(given.pop(sample), inputs[timestep], **given)[:1]

        return check_host(self.bundle, test, predict, self.engine)

    def __enter__(self) -> Self:
        self.runner.__enter__()
        if self.prologue is not None:
            self.prologue.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.runner.__exit__(kind, error, traceback)
        finally:
            if self.prologue is not None:
                self.prologue.__exit__(kind, error, traceback)


def load(  # noqa: PLR0913  # options of the one public entry, by keyword
    root: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    integer: bool = True,
    verify: bool = True,
    precision: str | None = None,
    self_test: bool = True,
) -> LoadedBundle:
    """Open a bundle, and ask it for the prediction that it brings along.

    What it returns is called like a function, by any number of threads at once, and is a context manager that frees the
    engine: ``with load(root) as denoiser: denoiser(sample, timestep, **conditioning)``.

    Args:
        root: A folder written by ``tfmq-export``.
        backend: "onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt", "tensorrt-rtx", "qnn", or "auto": an engine
            of the bundle that runs on this GPU, else what the bundle was compiled for if installed, else ONNX Runtime.
            "qnn" is Qualcomm's NPU; where there is none, its emulator, which "auto" never takes.
        threads: Of one inference on a CPU; None leaves the choice to the engine.
        integer: False gives the reference numerics: the same graph computed in floating point.
        verify: False saves comparing graphs, weights and engines with the manifest's hashes, about a second per GB.
        precision: What OpenVINO computes in where nothing is quantized: "f32" (if None), "bf16" or "f16".
        self_test: False saves that one call, and serves whatever the kernels of this host make of the graph.
    Raises:
        LoadError: no bundle, an altered file, or a graph that is not the manifest's.
        PrecisionError: the prediction is another than the stored one: this host's kernels are not those of the proof.
        BuildError: the engine refuses the graph.
        DependencyError: the engine is not installed, or needs a GPU that is not there.
    """
    bundle = open_bundle(Path(root))
    if verify:
        bundle.verify(served=True)
    info, manifest = bundle.manifest.prologue, bundle.manifest
    taken = {x.name for x in manifest.inputs}
    if info is not None:
        taken = {x.name for x in manifest.inputs if x.role != "conditioning" or x.name in info.direct}
        taken |= {tensor.name for tensor in info.tensors}
    with contextlib.ExitStack() as opened:  # a graph that is refused gives back what the others hold
        runner = open_graph(bundle, bundle.model, backend, threads=threads, integer=integer, precision=precision)
        opened.push(runner)
        _check_graph(bundle.model, runner, taken, {manifest.output})
        prologue = None
        if info is not None and bundle.prologue is not None:
            prologue = open_graph(
                bundle, bundle.prologue, backend, threads=threads, integer=integer, precision=precision
            )
            opened.push(prologue)
            _check_graph(bundle.prologue, prologue, set(info.reads), {tensor.name for tensor in info.tensors})
        loaded = LoadedBundle(bundle, runner, prologue)
        if self_test:
            require_host(bundle, loaded.check_host())
        opened.pop_all()
    return loaded


def _check_graph(path: Path, runner: Runner, inputs: set[str], outputs: set[str]) -> None:
    if inputs != set(runner.inputs) or not outputs <= set(runner.outputs):
        raise LoadError(
            f"{path}: takes {names_of(runner.inputs)} and gives {names_of(runner.outputs)}, the manifest says "
            f"{names_of(inputs)} and {names_of(outputs)}; compile the model again"
        )


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
