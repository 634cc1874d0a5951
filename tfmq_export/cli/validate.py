"""tfmq-validate: a bundle against the model it came from, or on the host that will serve it."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq_export.cli.console import bars, out, reports_errors
from tfmq_export.cli.options import (
    BundleFolder,
    Factory,
    JsonFile,
    Lora,
    MaxLpips,
    MinGuidance,
    MinPsnr,
    MinSqnr,
    MinSsim,
    Pipeline,
    Quiet,
    Seed,
    Variant,
    Version,
    answering,
    require_folder_of,
)
from tfmq_export.cli.result import show
from tfmq_export.errors import ConfigError
from tfmq_export.limits import MOST_IMAGES


@reports_errors
def validate(
    bundle: BundleFolder,
    against: Annotated[
        Path | None, typer.Option(help="The full-precision model the bundle came from.", show_default=False)
    ] = None,
    host: Annotated[
        bool,
        typer.Option("--host", help="Only run the bundle's self-test on this host; needs no model."),
    ] = False,
    factory: Factory = None,
    variant: Variant = None,
    lora: Lora = None,
    pipeline: Pipeline = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_IMAGES, help="Images to compare.", show_default="16, or fewer within --budget"),
    ] = None,
    budget: Annotated[str, typer.Option(help="Time that it may take, such as 90s, 30min or 2h.")] = "30min",
    seed: Seed = 1,
    min_psnr: MinPsnr = None,
    min_ssim: MinSsim = None,
    min_sqnr: MinSqnr = None,
    min_guidance: MinGuidance = None,
    max_lpips: MaxLpips = None,
    json: JsonFile = None,
    allow_precision_loss: Annotated[
        bool, typer.Option("--allow-precision-loss", help="Report layers that do not run in integers, but do not fail.")
    ] = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Compare a bundle with the model it came from, from the same noise. A missed threshold is exit code 6."""
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.config import load_config

    if host:
        if against is not None:
            raise ConfigError("--host compares with no model; leave out --against")
        with answering(json) as found:
            found |= {"bundle": str(bundle), **_on_this_host(bundle)}
        return
    if against is None and factory is None:
        raise ConfigError("give the model to compare with, --against MODEL, or --host for this host's kernels alone")

    asked = load_config(
        None,
        {
            "budget": budget,
            "thresholds.psnr": min_psnr,
            "thresholds.ssim": min_ssim,
            "thresholds.sqnr": min_sqnr,
            "thresholds.guidance": min_guidance,
            "thresholds.lpips": max_lpips,
        },
    )
    opened = open_bundle(bundle)
    opened.verify()
    require_folder_of(json)
    with bars(quiet) as progress:
        with progress.stage("Loading and capturing the model"):
            from tfmq_export.proof.validate import subject_of
            from tfmq_export.proof.validate import validate as run_validation

            subject = subject_of(opened, against, factory, variant=variant, lora=lora or (), pipeline=pipeline)
        seconds = asked.budget.total_seconds()
        validation = run_validation(
            subject, asked.thresholds, images=images, budget=seconds, seed=seed, progress=progress
        )
    with answering(json) as figures:
        show(opened, validation)
        figures |= validation.to_json()
    if not allow_precision_loss:
        validation.receipt.raise_if_lost()
    validation.report.raise_if_failed()


def _on_this_host(root: Path) -> dict[str, object]:
    """The bundle's self-test, and what it found."""
    from tfmq_export.runtime.loaded import load
    from tfmq_export.runtime.self_test import require_host

    with load(root, verify=True, self_test=False) as loaded:
        found = loaded.check_host()
        if found is None:
            raise ConfigError(f"{root}: brings no self-test; an older version wrote it, compile the model again")
        require_host(loaded.bundle, found)
    out.print(f"{root}: {found.describe()}", markup=False, highlight=False)
    return found.to_json()
