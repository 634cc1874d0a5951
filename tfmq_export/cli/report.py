"""tfmq-report: the page of a bundle, or one page to choose between several."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export.cli.console import COMPILING, brought, out, reports_errors, table
from tfmq_export.cli.options import JsonFile, Version, answering, require_folder_of

if TYPE_CHECKING:
    from tfmq_export.report.speed import Speed
    from tfmq_export.report.stored import Stored

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
    from tfmq_export.report.speed import read_bench, speed_of
    from tfmq_export.report.stored import Stored

    require_folder_of(output, json)
    timings = None if bench is None else read_bench(bench)
    speeds = [None if timings is None else speed_of(open_bundle(root), timings) for root in bundles]
    stored = [Stored.read(root, speed) for root, speed in zip(bundles, speeds, strict=True)]
    try:
        page = _page(bundles, speeds, output)
    except ModuleNotFoundError as error:  # a host that only runs bundles: the figures need no drawing
        if output is not None or (error.name or "").partition(".")[0] not in COMPILING:
            raise
        page, lacks = None, f"needs {error.name}, {brought(error.name or '', 'report')}"
    with answering(json) as found:
        if page is None:
            _show(stored)
            out.print(f"no page written: it {lacks}", markup=False, highlight=False)
            for each in stored:
                if each.page.exists():
                    out.print(f"drawn before: {each.page}", markup=False, highlight=False)
        else:
            out.print(f"report: {page}", markup=False, highlight=False)
        found |= {"page": None if page is None else str(page), "bundles": [str(root) for root in bundles]}


def _page(bundles: Sequence[Path], speeds: "Sequence[Speed | None]", output: Path | None) -> Path:
    """Draw the page of one bundle or of several; says where it is."""
    from tfmq_export.report.bundle_page import write_page
    from tfmq_export.report.comparison import write_comparison
    from tfmq_export.report.facts import Facts

    facts = [Facts.read(root, speed) for root, speed in zip(bundles, speeds, strict=True)]
    if len(facts) == 1:
        return write_page(facts[0], output)
    path = output or bundles[0].parent / COMPARISON
    write_comparison(facts, path)
    return path


def _show(stored: "Sequence[Stored]") -> None:
    """The verdict and the figures at the top of each bundle's page."""
    from tfmq_export.report.verdict import tiles_of, verdict_of

    for each in stored:
        verdict = verdict_of(each)
        rows = [(tile.label, f"{tile.value} {tile.unit}".strip(), tile.note) for tile in tiles_of(each)]
        table(f"{each.bundle.root}: {verdict.word} {verdict.text}", rows)
