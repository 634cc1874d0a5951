"""tfmq-build: TensorRT engines, or context binaries of Qualcomm chips, for a bundle."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export.cli.console import bars, out, reports_errors, table
from tfmq_export.cli.options import BundleFolder, JsonFile, Quiet, Version, answering
from tfmq_export.report.numbers import size

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.progress import Progress
    from tfmq_export.runtime.engines.qnn.contexts import BuiltContext
    from tfmq_export.runtime.engines.tensorrt.building.files import BuiltEngine
    from tfmq_export.runtime.measure.receipt import Receipt

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
Tokens = Annotated[
    str | None,
    typer.Option(
        help="Smallest, usual and largest length of a prompt, where a graph takes prompts of any length.",
        show_default="1,77,512",
    ),
]


@reports_errors
def build(
    bundle: BundleFolder,
    sm: Sm = None,
    batch: Batch = None,
    tokens: Tokens = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Build with TensorRT for this machine's GPU, not with TensorRT-RTX.")
    ] = False,
    qnn: Annotated[
        str | None,
        typer.Option(
            "--qnn",
            help="Compile a bundle of target qnn ahead for Snapdragon chips, such as sm8550,sm8650; "
            "each --batch is one number then.",
        ),
    ] = None,
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

    TensorRT-RTX builds for any list of GPUs on a machine that has none; TensorRT builds for the GPU it finds. With
    --qnn, context binaries for phones are compiled instead, and loaded again in the emulator.
    """
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.errors import ConfigError
    from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines
    from tfmq_export.runtime.engines.tensorrt.building.profile import LENGTHS, parse_sizes

    opened = open_bundle(bundle)
    if qnn is not None:
        if tensorrt or sm or tokens or workspace or timing_cache:
            raise ConfigError("--qnn compiles for phones; leave the options of TensorRT out")
        with bars(quiet) as progress:
            contexts = _contexts(opened, qnn, batch or ["1"], progress, allow_precision_loss)
        _tell(bundle, [_context_row(each) for each in contexts], [each.info.file for each in contexts])
        with answering(json) as found:
            found |= {"bundle": str(bundle), "engines": [_context_figures(each) for each in contexts]}
        return
    if tokens and not any(None in each.shape for each in opened.manifest.inputs):
        raise ConfigError("--tokens is for graphs that take prompts of any length; this one takes one length")
    if tensorrt and sm:
        raise ConfigError("TensorRT builds for the GPU of this machine; leave --sm out, or --tensorrt")
    batches = tuple(parse_sizes(text, "batch") for text in batch or ["1,2,8"])
    lengths = LENGTHS if tokens is None else parse_sizes(tokens, "tokens")
    lists = [()] if tensorrt else [_capabilities(text) for text in sm or ["80,89,120"]]
    built: list[BuiltEngine] = []
    with bars(quiet) as progress:
        for capabilities in lists:
            flavour = "tensorrt" if tensorrt else "tensorrt-rtx"
            scratch = None if workspace is None else workspace << 20
            request = EngineRequest(flavour, capabilities, batches, lengths, scratch, timing_cache)
            with progress.stage(f"Building for {_gpus(capabilities)}"):
                opened, more = add_engines(opened, request, allow_precision_loss=allow_precision_loss)
            built.extend(more)
    with answering(json) as found:
        _tell(bundle, [_row(each) for each in built], [each.info.file for each in built])
        found |= {"bundle": str(bundle), "engines": [_figures(each) for each in built]}


def _tell(bundle: Path, rows: list[tuple[str, ...]], files: list[str]) -> None:
    table(f"{bundle}: engines", rows, ("graph", "for", "in integers", "build", "size"))
    for name in files:
        out.print(f"written: {bundle / name}", markup=False, highlight=False)


def _contexts(
    bundle: "Bundle", chips: str, batches: list[str], progress: "Progress", allow_precision_loss: bool
) -> "list[BuiltContext]":
    from tfmq_export.errors import ConfigError
    from tfmq_export.runtime.engines.qnn.contexts import add_contexts

    if not all(text.strip().isdecimal() for text in batches):
        raise ConfigError(f"--batch {', '.join(batches)}: Hexagon takes one size; give one number for each --batch")
    built: list[BuiltContext] = []
    for batch in map(int, batches):
        with progress.stage(f"Compiling for {chips}, batch {batch}"):
            names = tuple(name.strip() for name in chips.split(","))
            bundle, more = add_contexts(bundle, names, batch, allow_precision_loss=allow_precision_loss)
        built.extend(more)
    return built


def _context_row(built: "BuiltContext") -> tuple[str, ...]:
    info = built.info
    return info.graph, info.chip, _counts(built.receipt), f"{built.seconds:.1f} s", size(info.size)


def _context_figures(built: "BuiltContext") -> dict[str, object]:
    kinds = {"convs": "conv", "linears": "linear", "attention_products": "attention"}
    counts = {name: built.receipt.counts(kind) for name, kind in kinds.items()}
    return {**asdict(built.info), "seconds": built.seconds, "proven": True, **counts}


def _counts(receipt: "Receipt") -> str:
    convolutions, linears = receipt.counts("conv"), receipt.counts("linear")
    return f"{convolutions[0]}/{convolutions[1]} convolutions, {linears[0]}/{linears[1]} linear"


def _row(built: "BuiltEngine") -> tuple[str, ...]:
    return (
        built.info.graph,
        _gpus(built.info.compute_capabilities),
        _counts(built.receipt) if built.proven else "not proven",
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
