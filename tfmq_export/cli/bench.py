"""tfmq-bench: how fast and how exact a bundle is, and against what."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export.cli.console import bars, err, out, people_on_stderr, reports_errors, table
from tfmq_export.cli.options import (
    STDOUT,
    Factory,
    JsonFile,
    Lora,
    Pipeline,
    Quiet,
    Variant,
    Version,
    require_folder_of,
    source_of,
    write_figures,
)
from tfmq_export.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from tfmq_export.bench.report import BenchReport

BASELINES = (
    "twin, ort-fp32, quantize-static, openvino-fp32, openvino-bf16, nncf, nncf-bf16, nncf-transformer, "
    "nncf-transformer-bf16, torch, torch-compile"
)


@reports_errors
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Bundles of one model, made by tfmq-export.")],
    against: Annotated[Path | None, typer.Option(help="The float model they came from; most baselines run it.")] = None,
    factory: Factory = None,
    variant: Variant = None,
    lora: Lora = None,
    pipeline: Pipeline = None,
    baselines: Annotated[
        str | None, typer.Option(help=f"Of {BASELINES}; with commas, or all, or none.", show_default="those at hand")
    ] = None,
    backends: Annotated[
        str, typer.Option(help="What runs the bundles: auto or names, as runtime.load takes them; or openvino-bf16.")
    ] = "auto",
    threads: Annotated[str, typer.Option(help="Threads of one inference, such as 1,2.")] = "1",
    batch: Annotated[str, typer.Option(help="Samples per call, or images per sampling run, such as 1,4.")] = "1",
    sampling: Annotated[bool, typer.Option("--sampling", help="Time whole sampling runs, prompt included.")] = False,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Judge all predictions on calls of --against held out from calibration.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How many turns each candidate takes.")] = 30,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop after so many seconds of turns, over all settings.")
    ] = None,
    json: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart into this file: PNG, PDF or SVG.")] = None,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Compare the speed of bundles with baselines. Each candidate runs in a process of its own; they take turns."""
    from tfmq_export.bench.candidates import baselines_named, candidates_of
    from tfmq_export.bench.report import BenchReport
    from tfmq_export.bench.run import Plan
    from tfmq_export.bench.run import bench as run_bench
    from tfmq_export.bundle.manifest import open_bundle

    require_folder_of(json, plot)
    if plot is not None:
        from tfmq_export.bench.plot import require_format, save_bars

        require_format(plot)
    opened = [open_bundle(folder) for folder in bundles]
    budget = math.inf if seconds is None else seconds
    plan = Plan(_numbers("--threads", threads), _numbers("--batch", batch), rounds, budget, sampling, accuracy)
    model = None
    if against is not None or factory is not None:
        try:
            from tfmq_export.bench.float_model import Model
        except ModuleNotFoundError as error:
            named = f"--factory {factory}" if against is None else f"--against {against}"
            raise DependencyError(
                f"{named}: the float model runs in torch, which is not installed ({error.name}); leave it "
                "out, or pip install 'tfmq-export[compile]'"
            ) from error
        model = Model(source_of(opened[0], against, factory, variant=variant, lora=lora, pipeline=pipeline))
    names = baselines_named(baselines, model=model is not None)
    candidates = candidates_of(opened, [word.strip() for word in backends.split(",")], names)

    def keep(report: BenchReport) -> None:
        if json is not None and json != STDOUT:
            write_figures(report.to_json(), json)

    with bars(quiet) as progress:
        report = run_bench(opened, model, candidates, plan, progress, keep=keep)
    with people_on_stderr(json == STDOUT):
        _show(report)
    if json == STDOUT:
        write_figures(report.to_json(), json)
    if plot is not None:
        save_bars(plot, report)


def _show(report: "BenchReport") -> None:
    """The tables, what ran on what, and where quantizing gained no speed."""
    from tfmq_export.bench.report import COSTS

    for setting in report.settings:
        title = f"{setting.title}, {setting.rounds} rounds, per {report.unit}"
        rows = [row.latency(setting.batch) for row in setting.rows]
        table(f"{title}; speed 1 is {setting.base}", rows, setting.columns)
        table("", [row.costs() for row in setting.rows], COSTS)
        for ran, runners in setting.ran().items():
            out.print(f"ran on {ran}: {', '.join(runners)}", markup=False, highlight=False)
        if note := setting.no_faster():
            err.print(f"warning: {note}", style="yellow", markup=False, highlight=False)
        for item in setting.missing:
            out.print(f"not run: {item.name}: {item.reason}", markup=False, highlight=False)
        out.print()
    for heading, text in report.about.items():
        out.print(f"{heading}: {text}", markup=False, highlight=False)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise ConfigError(f"{option} {text}: needs whole numbers with commas between") from None
