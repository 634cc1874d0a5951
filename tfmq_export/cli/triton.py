"""tfmq-triton: a bundle in a model repository of Triton Inference Server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import out, reports_errors
from tfmq_export.cli.options import BundleFolder

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.serving.options import Serving

ENGINE_HELP = "TensorRT engine to serve, as PATH, or 8.9=PATH for each compute capability."


@reports_errors
def triton(
    bundle: BundleFolder,
    repository: Annotated[Path, typer.Option("--output", "-o", metavar="REPO", help="Model repository to add it to.")],
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default="that of the folder OUT")] = None,
    model_version: Annotated[int | None, typer.Option(help="Its version.", show_default="the next")] = None,
    max_batch: Annotated[int, typer.Option(help="Most samples of one inference.")] = 8,
    instances: Annotated[int, typer.Option(help="Copies of the model that run at the same time (per GPU).")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each instance on a CPU; 0: all cores.")] = 0,
    gpu: Annotated[list[int] | None, typer.Option(help="GPU to use; repeat it.", show_default="all")] = None,
    queue_delay: Annotated[int, typer.Option(help="Microseconds a request may wait for others to join it.")] = 500,
    keep_versions: Annotated[int, typer.Option(help="Versions the server keeps loaded.")] = 2,
    engine: Annotated[list[str] | None, typer.Option(help=ENGINE_HELP)] = None,
    prologue_engine: Annotated[
        list[str] | None, typer.Option(help="TensorRT engine of the prologue, in the same form.")
    ] = None,
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
        gpus=tuple(gpu or ()),
        queue_delay_us=queue_delay,
        keep_versions=keep_versions,
        engines=_engines(engine),
        prologue_engines=_engines(prologue_engine),
    )
    add_to_repository(open_bundle(bundle), repository, serving)


def add_to_repository(bundle: "Bundle", repository: Path, serving: "Serving") -> None:
    """Write it and say where."""
    from tfmq_export.serving.repository import write_repository

    for served in write_repository(bundle, repository, serving):
        batching = f"batches of up to {served.max_batch}" if served.max_batch else "no batching by the server"
        out.print(f"written to [bold]{escape(str(served.folder))}[/], version {served.version}, {batching}")


def _engines(words: list[str] | None) -> dict[str, Path]:
    """Engines by compute capability; a path alone stands for every GPU."""
    pairs = [word.partition("=") if "=" in word else ("", "", word) for word in words or ()]
    return {capability: Path(path) for capability, _, path in pairs}
