"""Whether a file is an engine that Triton's TensorRT backend may load, as far as its first bytes and a manifest tell.

A plan of TensorRT begins with four letters, and so does an engine of TensorRT-RTX, with others:

    0   ftrt                    vtrt for TensorRT-RTX
    4   0, 0, 0, 0              how the header is written
    24  10, 14, 1, 48           the version that built it

The first is what NVIDIA's ``trtexec --getPlanVersionOnly`` asks of a plan; the second is what TensorRT-RTX 1.7 writes.
Nothing more is known of a file here: whether it is whole, and for which GPU, only TensorRT can tell.
"""

from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, EngineInfo, sha256
from tfmq_export.errors import ConfigError
from tfmq_export.serving.options import EVERY_GPU, Serving

PLAN, RTX = b"ftrt", b"vtrt"
HEADER_BYTES = 28
AGAIN = "build it with TensorRT on the GPU that serves it (docs/serving.md has the command)"


def require_engines(bundle: Bundle, serving: Serving) -> None:
    """Refuse files that are surely not the engines they are given as.

    Raises:
        ConfigError: one is no plan of TensorRT, or the bundle's manifest says that it is for something else.
    """
    pairs = [(bundle.model, serving.engines)]
    if bundle.prologue is not None:
        pairs.append((bundle.prologue, serving.prologue_engines))
    elif serving.prologue_engines:
        raise ConfigError(f"{bundle.root}: has no prologue; leave --prologue-engine out")
    for graph, engines in pairs:
        for capability, path in engines.items():
            require_plan(path)
            info = _listed(bundle, path)
            if info is not None:
                _require_built_for(path, info, graph.relative_to(bundle.root).as_posix(), capability)


def require_plan(path: Path) -> None:
    """Refuse a file that does not begin as a plan of TensorRT does.

    Raises:
        ConfigError: says how it begins.
    """
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    if head.startswith(RTX) and len(head) == HEADER_BYTES:
        version = ".".join(map(str, head[24:]))
        raise ConfigError(f"{path}: an engine of TensorRT-RTX {version}, which Triton does not load; {AGAIN}")
    if not head.startswith(PLAN):
        raise ConfigError(
            f"{path}: begins with {head[: len(PLAN)]!r}, where a plan of TensorRT begins with {PLAN!r}; {AGAIN}"
        )
    if len(head) < HEADER_BYTES:
        raise ConfigError(f"{path}: {len(head)} bytes, less than the header of a plan; {AGAIN}")


def _listed(bundle: Bundle, path: Path) -> EngineInfo | None:
    """What the manifest knows of a file, wherever it was copied to."""
    size = path.stat().st_size
    alike = [info for info in bundle.manifest.engines if info.size == size and info.file in bundle.manifest.files]
    hashed = sha256(path) if alike else ""
    return next((info for info in alike if bundle.manifest.files[info.file] == hashed), None)


def _require_built_for(path: Path, info: EngineInfo, graph: str, capability: str) -> None:
    """Hold an engine that the manifest lists to what it is given as."""
    if info.flavour != "tensorrt":
        raise ConfigError(f"{path}: built with {info.flavour} {info.version}, says the manifest; {AGAIN}")
    if info.graph != graph:
        raise ConfigError(
            f"{path}: built from {info.graph}, says the manifest, and given for {graph}; --engine is for the denoiser, "
            "--prologue-engine for the prologue"
        )
    built = [f"{each // 10}.{each % 10}" for each in info.compute_capabilities]
    if capability != EVERY_GPU and capability not in built:
        raise ConfigError(f"{path}: built for {', '.join(built)}, says the manifest, not for {capability}; {AGAIN}")
