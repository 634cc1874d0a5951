"""Engines as part of a bundle: built, proven, named, and listed in its manifest.

OUT/unet/engines/unet.tensorrt-rtx-1.7.1.116.sm89.batch1-2-8.engine        the engine
OUT/unet/engines/unet.tensorrt-rtx-1.7.1.116.sm89.batch1-2-8.engine.json   its receipt
"""

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, EngineInfo, LayerInfo
from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions, EngineBuild, build_engine, engine_name
from tfmq_export.runtime.engines.tensorrt.building.profile import LENGTHS, Profile, Sizes, step_profiles
from tfmq_export.runtime.engines.tensorrt.building.trtexec import write_build_script
from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu
from tfmq_export.runtime.engines.tensorrt.receipt import read_facts, receipt_of_engine
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt
from tfmq_export.target import find_target

AHEAD = "tensorrt-rtx"
"""The flavour that builds for GPUs that are not there."""

UNPROVEN = "the build log lists no layers that can be read here; what runs in int8 is not proven"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Which engine to build.

    Attributes:
        flavour: "tensorrt-rtx" or "tensorrt".
        compute_capabilities: GPUs of one TensorRT-RTX engine; none for TensorRT, which builds for the GPU at hand.
        batches: Smallest, usual and largest batch, once per profile.
        lengths: Likewise of prompts, in tokens, where their length may vary.
        workspace_bytes: Limit of the scratch memory; the library's own choice if None.
        timing_cache: File of kernel timings, read and written; TensorRT only.
    """

    flavour: str = AHEAD
    compute_capabilities: tuple[int, ...] = (80, 89, 120)
    batches: tuple[Sizes, ...] = ((1, 2, 8),)
    lengths: Sizes = LENGTHS
    workspace_bytes: int | None = None
    timing_cache: Path | None = None

    def options(self, profiles: tuple[Profile, ...]) -> BuildOptions:
        """How to build one graph."""
        return BuildOptions(self.flavour, self.compute_capabilities, profiles, self.workspace_bytes, self.timing_cache)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that was added to a bundle.

    Attributes:
        proven: Whether the build listed its layers. Each TensorRT may word that list in its own way.
    """

    info: EngineInfo
    receipt: Receipt
    seconds: float
    proven: bool


def add_engines(
    bundle: Bundle, request: EngineRequest, *, allow_precision_loss: bool = False
) -> tuple[Bundle, tuple[BuiltEngine, ...]]:
    """Build an engine from each graph of a bundle and list them in its manifest.

    Args:
        allow_precision_loss: Keep an engine whose layers do not all run in the integers asked for.
    Returns:
        The bundle with the engines, and what was built: the prologue's engine last, where there is one.
    Raises:
        ConfigError: the bundle was compiled for another kind of engine, or the request fits neither graph nor library.
        DependencyError: the library is not installed.
        BuildError: the parser or the builder refuses a graph, or crashes on it.
        PrecisionError: a layer would not run in integers; nothing is added.
    """
    manifest = bundle.manifest
    if find_target(manifest.target).engine != "tensorrt":
        raise ConfigError(
            f"{bundle.root}: compiled for {manifest.target}; TensorRT needs a graph of its own: compile it with "
            f"--target {request.flavour} --recipe {bundle.root}"
        )
    once = frozenset(manifest.prologue.layers) if manifest.prologue is not None else frozenset()
    shapes = step_profiles(manifest, request.batches, request.lengths)
    jobs = [(bundle.model, shapes, [x for x in manifest.layers if x.name not in once])]
    if bundle.prologue is not None:
        plain = tuple(Profile(batch) for batch in request.batches)
        jobs.append((bundle.prologue, plain, [x for x in manifest.layers if x.name in once]))
    finished: list[tuple[EngineBuild, BuiltEngine]] = []
    try:
        for graph, profiles, layers in jobs:
            finished.append(_build(bundle, graph, request.options(profiles), layers))
            built = finished[-1][1]
            if not built.proven:
                _log.warning("%s: %s", built.info.file, UNPROVEN)
            elif not allow_precision_loss:
                built.receipt.raise_if_lost()
        # An engine of the same name stays what the manifest says until all of the new ones are proven.
        for build, built in finished:
            _place(bundle, build, built)
    finally:
        for build, _ in finished:
            build.path.unlink(missing_ok=True)
    added = tuple(built for _, built in finished)
    files = [name for each in added for name in (each.info.file, each.info.receipt)]
    return bundle.extended(files, [each.info for each in added]), added


def add_engines_in_place(bundle: Bundle, *, allow_precision_loss: bool = False) -> Bundle:
    """Build with TensorRT where it and a GPU are here; for other machines, put a script into the bundle."""
    bundle = write_build_script(bundle)
    if importlib.util.find_spec("tensorrt") is None or not has_gpu():
        return bundle
    request = EngineRequest("tensorrt", compute_capabilities=())
    return add_engines(bundle, request, allow_precision_loss=allow_precision_loss)[0]


def _build(
    bundle: Bundle, graph: Path, options: BuildOptions, layers: Sequence[LayerInfo]
) -> tuple[EngineBuild, BuiltEngine]:
    """Build an engine under a temporary name, and say what it will be in the bundle."""
    folder = graph.parent / "engines"
    folder.mkdir(exist_ok=True)
    facts = read_facts(graph, options)  # first: the library's parser follows links out of the graph's folder
    build = build_engine(graph, folder / ".new.engine", options)
    try:
        if not build.layers and build.flavour == AHEAD:
            raise BuildError(f"{graph}: the build log of {build.flavour} {build.version} lists no layers")
        macs = bundle.manifest.macs
        if build.layers:
            receipt = receipt_of_engine(build.layers, layers, macs, facts)
        else:
            receipt = Receipt(tuple(LayerReceipt(layer, (), UNPROVEN) for layer in layers), (), macs)
        size = build.path.stat().st_size
    except BaseException:
        build.path.unlink(missing_ok=True)
        raise
    info = EngineInfo(
        file=(folder / engine_name(graph.parent.name, build, options.profiles)).relative_to(bundle.root).as_posix(),
        graph=graph.relative_to(bundle.root).as_posix(),
        flavour=build.flavour,
        version=build.version,
        compute_capabilities=build.compute_capabilities,
        size=size,
        profiles=tuple(
            {name: (each.smallest, each.usual, each.largest) for name, each in shapes.items()}
            for shapes in build.shapes
        ),
    )
    return build, BuiltEngine(info, receipt, build.seconds, bool(build.layers))


def _place(bundle: Bundle, build: EngineBuild, built: BuiltEngine) -> None:
    """Give an engine and its receipt their names."""
    receipt = build.path.with_name(".new.engine.json")
    try:
        receipt.write_text(_account(build, built.receipt) + "\n", "utf-8")
        receipt.replace(bundle.root / built.info.receipt)
    finally:
        receipt.unlink(missing_ok=True)
    build.path.replace(bundle.root / built.info.file)


def _account(build: EngineBuild, receipt: Receipt) -> str:
    """The receipt as JSON: layers asked for, layers of the engine, and what the library said."""
    engine = [
        {"name": x.name, "kind": x.kind, "type": x.type, "nodes": list(x.nodes)} for x in build.layers if x.computes
    ]
    account = {
        **receipt.to_json(),
        "flavour": build.flavour,
        "version": build.version,
        "compute_capabilities": list(build.compute_capabilities),
        "seconds": round(build.seconds, 2),
        "engine_layers": engine,
        "messages": list(build.messages),
    }
    return json.dumps(account, indent=1, ensure_ascii=False)
