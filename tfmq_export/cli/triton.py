"""tfmq-triton: a bundle in a model repository of Triton Inference Server."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import out, reports_errors
from tfmq_export.cli.options import BundleFolder, JsonFile, Version, answering
from tfmq_export.errors import ConfigError

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.serving.options import Serving
    from tfmq_export.serving.repository import ServedModel

KEPT = "or as earlier versions have it"
ENGINE_HELP = "TensorRT engine to serve, as PATH, or 8.9=PATH for each compute capability."


@reports_errors
def triton(
    bundle: BundleFolder,
    repository: Annotated[Path, typer.Option("--output", "-o", metavar="REPO", help="Model repository to add it to.")],
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default="that of the folder OUT")] = None,
    model_version: Annotated[int | None, typer.Option(help="Its version.", show_default="the next")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Most samples of one inference.", show_default=f"8, {KEPT}")
    ] = None,
    instances: Annotated[
        int | None, typer.Option(help="Copies that run at the same time (per GPU).", show_default=f"1, {KEPT}")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each instance on a CPU; 0: all cores.", show_default=f"0, {KEPT}")
    ] = None,
    gpu: Annotated[list[int] | None, typer.Option(help="GPU to use; repeat it.", show_default=f"all, {KEPT}")] = None,
    queue_delay: Annotated[
        int | None,
        typer.Option(help="Microseconds a request may wait for others to join it.", show_default=f"500, {KEPT}"),
    ] = None,
    keep_versions: Annotated[
        int | None, typer.Option(help="Versions the server keeps loaded.", show_default=f"2, {KEPT}")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help=ENGINE_HELP)] = None,
    prologue_engine: Annotated[
        list[str] | None, typer.Option(help="TensorRT engine of the prologue, in the same form.")
    ] = None,
    json: JsonFile = None,
    version: Version = False,
) -> None:
    """Add a bundle to a model repository of Triton Inference Server."""
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.serving.options import Serving

    serving = Serving(
        name=name or bundle.absolute().name,
        version=model_version,
        max_batch=max_batch,
        instances=instances,
        threads=threads,
        gpus=tuple(gpu) if gpu else None,
        queue_delay_us=queue_delay,
        keep_versions=keep_versions,
        engines=_engines(engine),
        prologue_engines=_engines(prologue_engine),
    )
    with answering(json) as found:
        served = add_to_repository(open_bundle(bundle), repository, serving)
        found["models"] = [{**asdict(each), "folder": str(each.folder)} for each in served]


def add_to_repository(bundle: "Bundle", repository: Path, serving: "Serving") -> "tuple[ServedModel, ...]":
    """Write it and say where."""
    from tfmq_export.serving.repository import write_repository

    written = write_repository(bundle, repository, serving)
    for served in written:
        batching = f"batches of up to {served.max_batch}" if served.max_batch else "no batching by the server"
        out.print(f"written to [bold]{escape(str(served.folder))}[/], version {served.version}, {batching}")
        if served.kept:
            out.print(f"kept from its earlier versions: {' '.join(served.kept)}")
    return written


def _engines(words: list[str] | None) -> dict[str, Path]:
    """Engines by compute capability; a path alone stands for every GPU."""
    engines: dict[str, Path] = {}
    for word in words or ():
        capability, path = word.split("=", 1) if "=" in word else ("", word)
        if capability in engines:
            raise ConfigError(f"{word}: there are two engines for {capability or 'every GPU'}; give one")
        engines[capability] = Path(path)
    return engines
