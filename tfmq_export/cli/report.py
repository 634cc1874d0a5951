"""tfmq-report: the page of a bundle, or one page to choose between several."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq_export.cli.console import out, reports_errors
from tfmq_export.cli.options import JsonFile, Version, answering, require_folder_of

COMPARISON = "comparison.html"


@reports_errors
def report(
    bundles: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Bundles made by tfmq-export.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Page to write.", show_default="OUT/tfmq/report.html; comparison.html beside them"
        ),
    ] = None,
    bench: Annotated[Path | None, typer.Option(help="Show the speed in this file of tfmq-bench --json.")] = None,
    json: JsonFile = None,
    version: Version = False,
) -> None:
    """Write the report of a bundle again, or compare several: quality against size, and against time where known."""
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.report.bundle_page import write_page
    from tfmq_export.report.comparison import write_comparison
    from tfmq_export.report.facts import Facts
    from tfmq_export.report.speed import read_bench, speed_of

    require_folder_of(output, json)
    timings = None if bench is None else read_bench(bench)
    facts = [Facts.read(root, None if timings is None else speed_of(open_bundle(root), timings)) for root in bundles]
    if len(facts) == 1:
        path = write_page(facts[0], output)
    else:
        path = output or bundles[0].parent / COMPARISON
        write_comparison(facts, path)
    with answering(json) as found:
        out.print(f"report: {path}", markup=False, highlight=False)
        found |= {"page": str(path), "bundles": [str(root) for root in bundles]}
