"""tfmq-build: TensorRT engines for a bundle."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export.cli.console import bars, out, reports_errors, table
from tfmq_export.cli.options import BundleFolder, JsonFile, Quiet, Version, answering
from tfmq_export.report.numbers import size

if TYPE_CHECKING:
    from tfmq_export.runtime.engines.tensorrt.building.files import BuiltEngine

Sm = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        help="Compute capabilities of a TensorRT-RTX engine, such as 89 or 80,89,120; repeat it for more engines.",
        show_default="80,89,120",
    ),
]
Batch = Annotated[
    list[str] | None,
    typer.Option(
        help="A profile: smallest, usual and largest batch, such as 1,2,8, or one number; repeat it for more profiles.",
        show_default="1,2,8",
    ),
]


@reports_errors
def build(
    bundle: BundleFolder,
    sm: Sm = None,
    batch: Batch = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Build with TensorRT for this machine's GPU, not with TensorRT-RTX.")
    ] = False,
    workspace: Annotated[int | None, typer.Option(min=1, help="Limit of the builder's scratch memory, MiB.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings to read and write (TensorRT).")
    ] = None,
    allow_precision_loss: Annotated[
        bool, typer.Option("--allow-precision-loss", help="Keep engines whose layers do not all run in integers.")
    ] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Build a bundle's TensorRT engines, prove that they run in integers, and list them in its manifest.

    TensorRT-RTX builds for any list of GPUs on a machine that has none; TensorRT builds for the GPU it finds.
    """
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.errors import ConfigError
    from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines
    from tfmq_export.runtime.engines.tensorrt.building.profile import parse_batch

    opened = open_bundle(bundle)
    if tensorrt and sm:
        raise ConfigError("TensorRT builds for the GPU of this machine; leave --sm out, or --tensorrt")
    batches = tuple(parse_batch(text) for text in batch or ["1,2,8"])
    lists = [()] if tensorrt else [_capabilities(text) for text in sm or ["80,89,120"]]
    built: list[BuiltEngine] = []
    with bars(quiet) as progress:
        for capabilities in lists:
            flavour = "tensorrt" if tensorrt else "tensorrt-rtx"
            scratch = None if workspace is None else workspace << 20
            request = EngineRequest(flavour, capabilities, batches, scratch, timing_cache)
            with progress.stage(f"Building for {_gpus(capabilities)}"):
                opened, more = add_engines(opened, request, allow_precision_loss=allow_precision_loss)
            built.extend(more)
    with answering(json) as found:
        table(f"{bundle}: engines", [_row(each) for each in built], ("graph", "GPUs", "in int8", "build", "size"))
        for each in built:
            out.print(f"written: {bundle / each.info.file}", markup=False, highlight=False)
        found |= {"bundle": str(bundle), "engines": [_figures(each) for each in built]}


def _row(built: "BuiltEngine") -> tuple[str, ...]:
    convolutions, linears = built.receipt.counts("conv"), built.receipt.counts("linear")
    counts = f"{convolutions[0]}/{convolutions[1]} convolutions, {linears[0]}/{linears[1]} linear"
    return (
        built.info.graph,
        _gpus(built.info.compute_capabilities),
        counts if built.proven else "not proven",
        f"{built.seconds:.1f} s",
        size(built.info.size),
    )


def _figures(built: "BuiltEngine") -> dict[str, object]:
    return {
        **asdict(built.info),
        "seconds": built.seconds,
        "proven": built.proven,
        "convs": built.receipt.counts("conv"),
        "linears": built.receipt.counts("linear"),
    }


def _capabilities(text: str) -> tuple[int, ...]:
    """``80,89`` or ``8.0,8.9``."""
    from tfmq_export.errors import ConfigError

    try:
        return tuple(int(part.replace(".", "").removeprefix("sm")) for part in text.lower().split(","))
    except ValueError:
        raise ConfigError(f"--sm {text!r}: give compute capabilities such as 89 or 80,89,120") from None


def _gpus(capabilities: tuple[int, ...]) -> str:
    return f"SM {', '.join(map(str, capabilities))}" if capabilities else "this GPU"
