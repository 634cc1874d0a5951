"""Latency of a bundle against fp32 on the same engine, interleaved in one run."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tfmq_export.bundle import Bundle
from tfmq_export.errors import ConfigError, RecipeError
from tfmq_export.export import export_onnx
from tfmq_export.models.load import Source, load
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model, import_graph, save_model
from tfmq_export.passes.strip_qdq import StripQdq
from tfmq_export.program import capture
from tfmq_export.progress import Progress
from tfmq_export.runtime.benchmark import Timing, speedups, time_interleaved
from tfmq_export.runtime.denoiser import load as load_bundle
from tfmq_export.runtime.engines import engine_version, open_runner
from tfmq_export.target import find_target

TWIN, EXPORT = "fp32 twin (same graph, no Q/DQ)", "fp32 export of the model"


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Timings by candidate; speedups are medians of per-round ratios against the fp32 baseline."""

    engine: str
    timings: Mapping[str, Timing]
    speedups: Mapping[str, float]

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        figures = {name: {**timing.to_json(), "speedup": self.speedups[name]} for name, timing in self.timings.items()}
        path.write_text(json.dumps({"engine": self.engine, "candidates": figures}, indent=1) + "\n", "utf-8")


def bench_bundle(
    bundle: Bundle, source: Source | None, *, threads: int, batch: int, rounds: int, progress: Progress
) -> BenchResult:
    """Time one call of the bundle and of its fp32 baseline in alternation.

    Args:
        source: The model whose plain export is the baseline; None takes the bundle's own graph without Q/DQ.
    Raises:
        ConfigError: the bundle's engine does not run on a CPU.
    """
    target = find_target(bundle.manifest.target)
    if target.engine == "tensorrt" or not target.integers:
        raise ConfigError(
            f"{bundle.root}: compiled for {bundle.manifest.target}, whose integers run on a GPU only; compile it for "
            "ort-cpu or openvino to time it here"
        )
    lowered = {item.name: item.changed for item in bundle.manifest.passes}
    if source is None and lowered.get("LowerTimestepGrids"):
        raise ConfigError(
            f"{bundle.root}: has no float twin, because its grids per timestep are part of the graph; "
            "compare with the model's own export: --against MODEL"
        )
    baseline = TWIN if source is None else EXPORT
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        with progress.stage("Preparing the fp32 baseline"):
            model = _float_twin(bundle) if source is None else _float_export(bundle, source)
            save_model(model, path)
            own = _step_feeds(bundle, batch)
            given = own if source is None else _feeds(bundle, batch, model)
            candidates = {
                baseline: (open_runner(path, bundle.manifest.target, threads=threads), given),
                f"{bundle.manifest.preset} bundle": (
                    open_runner(bundle.model, bundle.manifest.target, threads=threads),
                    own,
                ),
            }
        calls = {name: partial(runner.infer, feeds) for name, (runner, feeds) in candidates.items()}
        with progress.stage("Timing, interleaved"):
            timings = time_interleaved(calls, rounds=rounds)
    return BenchResult(engine_version(bundle.manifest.target), timings, speedups(timings, baseline))


def _float_twin(bundle: Bundle) -> onnx.ModelProto:
    graph = import_graph(onnx.load(bundle.model))
    run_passes(graph, [StripQdq()])
    return export_model(graph)


def _float_export(bundle: Bundle, source: Source) -> onnx.ModelProto:
    program = capture(load(source))
    if program.fingerprint != bundle.manifest.fingerprint:
        raise RecipeError(f"{bundle.root} was not compiled from {source.path}; give the model it came from")
    return export_onnx(program)


def _step_feeds(bundle: Bundle, batch: int) -> dict[str, NDArray[np.generic]]:
    """Inputs of one step of the bundle: where it has a prologue, what that returns in place of the conditioning."""
    feeds = _feeds(bundle, batch)
    with load_bundle(bundle.root) as loaded:
        prompt = loaded.prepare(**{info.name: feeds.pop(info.name) for info in bundle.manifest.input("conditioning")})
    return {**feeds, **prompt.feeds}


def _feeds(bundle: Bundle, batch: int, model: onnx.ModelProto | None = None) -> dict[str, NDArray[np.generic]]:
    """Inputs to time with: noise, the first timestep of the schedule, the stored conditioning.

    Args:
        model: A plain export, whose timestep has the rank the module took; bundles take a vector.
    """
    ranks = {} if model is None else {x.name: len(x.type.tensor_type.shape.dim) for x in model.graph.input}
    generator = np.random.default_rng(0)
    stored = bundle.conditioning()
    feeds: dict[str, NDArray[np.generic]] = {}
    for info in bundle.manifest.inputs:
        if info.role == "timestep":
            first = bundle.manifest.timesteps.array[:1]
            feeds[info.name] = first.reshape(()) if ranks.get(info.name) == 0 else first.repeat(batch)
        elif info.role == "sample":
            feeds[info.name] = generator.standard_normal((batch, *(side or 1 for side in info.shape)), np.float32)
        else:
            feeds[info.name] = stored[info.name][np.arange(batch) % len(stored[info.name])]
    return feeds
