"""The process that builds an engine.

    python child.py JOB.json

The job is ``BuildJob`` as JSON. The log goes to a file line by line, so that it outlives a builder that crashes; the
result is written last.

One path for TensorRT 10, TensorRT 11 and TensorRT-RTX: precision is what the graph's own types say, and nothing that
TensorRT 11 removed is touched.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tfmq_export.errors import DependencyError
from tfmq_export.runtime.engines.tensorrt.library import import_tensorrt, recorder

if TYPE_CHECKING:
    from tfmq_export.runtime.engines.tensorrt.api import Builder, IBuilderConfig, INetworkDefinition, OnnxParser

Shapes = dict[str, tuple[tuple[int, ...], ...]]
"""Smallest, usual and largest shape by input name."""

STRONGLY_TYPED_ALWAYS = 11
"""Major version from which every network is strongly typed and the flag is gone."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """What the child is asked to do.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        log: Where one JSON object per message goes: severity, text.
        compute_capabilities: Such as 89; TensorRT-RTX only.
        profiles: Of each, "shapes" (smallest, usual and largest by input name) and "batch" (the same for the first
            axis of every other input where it may vary).
    """

    flavour: str
    onnx: str
    engine: str
    log: str
    result: str
    compute_capabilities: tuple[int, ...]
    profiles: tuple[dict[str, Any], ...]
    workspace_bytes: int | None
    timing_cache: str | None


class RefusedError(Exception):
    """The job cannot be done as asked; ``lines`` say why."""

    def __init__(self, kind: str, *lines: str) -> None:
        super().__init__(*lines)
        self.kind = kind
        self.lines = lines


def main(job_path: str) -> int:
    """Do one job; the exit code is 0 wherever a result could be written."""
    job = BuildJob(**json.loads(Path(job_path).read_text("utf-8")))
    result: dict[str, Any] = {"error": "", "lines": [], "version": "", "profiles": []}
    with Path(job.log).open("w", encoding="utf-8") as log:
        try:
            trt = import_tensorrt(job.flavour)
            result["version"] = trt.__version__
            engine, result["profiles"] = build(trt, job, log)
            Path(job.engine).write_bytes(engine)
        except DependencyError as error:
            result |= {"error": "import", "lines": [str(error)]}
        except RefusedError as refusal:
            result |= {"error": refusal.kind, "lines": refusal.lines}
    Path(job.result).write_text(json.dumps(result), "utf-8")
    return 0


def build(trt: Any, job: BuildJob, log: TextIO) -> tuple[memoryview, list[Shapes]]:
    """Parse the graph and build the engine: its bytes, and the shapes of each profile."""

    def write(severity: str, text: str) -> None:
        log.write(json.dumps({"severity": severity, "text": text}) + "\n")
        log.flush()

    logger = recorder(trt, write)
    builder: Builder = trt.Builder(logger)
    major = int(trt.__version__.partition(".")[0])
    # TensorRT-RTX counts its own versions, is at 1, and still has the flag.
    typed = 0 if major >= STRONGLY_TYPED_ALWAYS else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser: OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        lines = [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise RefusedError("parse", *lines)

    config = builder.create_builder_config()
    # The log then lists every layer with its types and the ONNX nodes it came from.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.flavour == "tensorrt-rtx":
        set_compute_capabilities(trt, config, job.compute_capabilities)
    profiles = [add_profile(builder, network, config, **profile) for profile in job.profiles]
    cache = None if job.timing_cache is None else Path(job.timing_cache)
    if cache is not None:
        known = cache.read_bytes() if cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RefusedError("build")
    if cache is not None:
        partial = cache.with_name(f".{cache.name}.partial")
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.replace(cache)  # builds may share it
    return memoryview(engine), profiles


def set_compute_capabilities(trt: Any, config: "IBuilderConfig", capabilities: tuple[int, ...]) -> None:
    """Choose the GPUs that a TensorRT-RTX engine will run on."""
    known = {int(name[2:]): name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if capability not in known:
            offered = ", ".join(map(str, sorted(known)))
            raise RefusedError("option", f"compute capability {capability} is none of those it builds for ({offered})")
        config.set_compute_capability(getattr(trt.ComputeCapability, known[capability]), index)


def add_profile(
    builder: "Builder",
    network: "INetworkDefinition",
    config: "IBuilderConfig",
    *,
    batch: tuple[int, int, int],
    shapes: Shapes,
) -> Shapes:
    """Give every input that may vary its smallest, usual and largest shape, and say which."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    stray = sorted(shapes.keys() - inputs.keys())
    if stray:
        raise RefusedError("option", f"the profile names {stray[0]!r}; the graph's inputs are {', '.join(inputs)}")
    profile, given = builder.create_optimization_profile(), {}
    for name, shape in inputs.items():
        if -1 not in shape:
            continue
        if name not in shapes and -1 in shape[1:]:
            raise RefusedError("option", f"{name} {list(shape)}: more than its batch may vary; give it a profile")
        given[name] = shapes.get(name) or tuple((size, *shape[1:]) for size in batch)
        smallest, usual, largest = given[name]
        profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
    if given:
        config.add_optimization_profile(profile)
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
