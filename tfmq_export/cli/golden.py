"""tfmq-golden: record what a bundle answers, to compare later bundles with it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import out, reports_errors
from tfmq_export.cli.options import BundleFolder, JsonFile, Seed, Version, answering, require_folder_of
from tfmq_export.limits import MOST_SAMPLES
from tfmq_export.report.numbers import size


@reports_errors
def golden(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (JSON).")],
    samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Samples per timestep, and images.")] = 2,
    seed: Seed = 0,
    json: JsonFile = None,
    version: Version = False,
) -> None:
    """Record the answers of an accepted bundle in a small file, which release gates compare with."""
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.gate.golden import make_golden, write_golden

    require_folder_of(output, json)
    opened = open_bundle(bundle)
    made = make_golden(opened, samples=samples, seed=seed)
    write_golden(made, output)
    written = output.stat().st_size
    with answering(json) as found:
        out.print(
            f"written to [bold]{escape(str(output))}[/] ({size(written)}): "
            f"{len(made.predictions)} timesteps, {len(made.images)} images"
        )
        if not made.images:
            out.print(f"no images: gates draw with linear ones in numpy; its sampler is {opened.manifest.sampler.kind}")
        counts = {"timesteps": len(made.predictions), "images": len(made.images)}
        found |= {"file": str(output), "bytes": written, **counts}
