"""What a run would take, as a table on the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_export.cli.console import err, out, table
from tfmq_export.report.numbers import seconds, size

if TYPE_CHECKING:
    from tfmq_export.compiler.forecast import Forecast


def show_forecast(expected: "Forecast", root: Path) -> None:
    """The forecast for people, stage by stage."""
    rows = [(stage.title, seconds(stage.seconds), size(stage.memory_bytes)) for stage in expected.all_stages]
    rows.append(("in all", seconds(expected.seconds), f"{size(expected.peak_bytes)} at most"))
    table(f"{root}: what it would take", rows, ("stage", "time", "memory"))
    proof, sizes = expected.proof, expected.sizes
    drawn = f"{expected.images} images to calibrate with, " if expected.images else ""
    out.print(f"\n{drawn}{proof.images} to compare, {proof.timesteps} timesteps in lock-step")
    waiting = f", {size(expected.spilled)} in the temporary folder meanwhile" if expected.spilled else ""
    out.print(f"disk: {size(sizes.output)} in all, {size(sizes.model)} of them the graph{waiting}")
    if expected.shortage is not None:
        err.print(f"warning: {expected.shortage}", style="yellow", markup=False, highlight=False)
