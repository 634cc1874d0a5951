"""tfmq-bench: how fast a bundle is, and against what."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq_export.cli.options import BundleFolder, Factory, Quiet, Threads, source_of
from tfmq_export.console import bars, reports_errors, table


@reports_errors
def bench(
    bundle: BundleFolder,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 30,
    against: Annotated[
        Path | None, typer.Option(help="Baseline: this model's own fp32 export instead of the bundle's float twin.")
    ] = None,
    factory: Factory = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time a bundle against fp32 on its own engine, interleaved in one run."""
    from tfmq_export.bench import bench_bundle
    from tfmq_export.bundle import open_bundle

    opened = open_bundle(bundle)
    with bars(quiet) as progress:
        source = None if against is None else source_of(opened, against, factory)
        result = bench_bundle(opened, source, threads=threads, batch=batch, rounds=rounds, progress=progress)
    rows = [
        (name, f"{timing.median * 1e3:.2f}", f"{timing.p10 * 1e3:.2f}", f"{timing.p90 * 1e3:.2f}", f"{ratio:.2f}x")
        for (name, timing), ratio in zip(result.timings.items(), result.speedups.values(), strict=True)
    ]
    header = ("", "median ms", "p10", "p90", "speed")
    table(f"{bundle}: batch {batch}, {threads} thread(s), {rounds} interleaved rounds, {result.engine}", rows, header)
    if json is not None:
        result.write(json)
