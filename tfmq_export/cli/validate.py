"""tfmq-validate: a bundle against the model it came from."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq_export.cli.options import Against, BundleFolder, Factory, MinPsnr, MinSqnr, MinSsim, Quiet, require_folder_of
from tfmq_export.cli.result import show
from tfmq_export.console import bars, reports_errors


@reports_errors
def validate(
    bundle: BundleFolder,
    against: Against,
    factory: Factory = None,
    images: Annotated[int, typer.Option(min=1, help="Images to compare.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 1,
    min_psnr: MinPsnr = None,
    min_ssim: MinSsim = None,
    min_sqnr: MinSqnr = None,
    json: Annotated[Path | None, typer.Option(help="Write the full report here.")] = None,
    allow_precision_loss: Annotated[
        bool, typer.Option("--allow-precision-loss", help="Report lost layers only.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare a bundle with the model it came from, on the same noise; exits with 6 on a miss."""
    from tfmq_export.bundle import open_bundle
    from tfmq_export.config import load_config

    thresholds = load_config(
        None, {"thresholds.psnr": min_psnr, "thresholds.ssim": min_ssim, "thresholds.sqnr": min_sqnr}
    ).thresholds
    opened = open_bundle(bundle)
    opened.verify()
    require_folder_of(json)
    with bars(quiet) as progress:
        with progress.stage("Loading and capturing the model"):
            from tfmq_export.validate import subject_of
            from tfmq_export.validate import validate as run_validation

            subject = subject_of(opened, against, factory)
        validation = run_validation(subject, thresholds, images=images, seed=seed, progress=progress)
    show(opened, validation)
    if json is not None:
        validation.write(json)
    if not allow_precision_loss:
        validation.receipt.raise_if_lost()
    validation.report.raise_if_failed()
