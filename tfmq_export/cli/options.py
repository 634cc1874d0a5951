"""Arguments and options that several commands share."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export import __version__
from tfmq_export.bundle.write import replaced_file
from tfmq_export.cli.console import out, people_on_stderr
from tfmq_export.errors import OutputError
from tfmq_export.limits import LARGEST_SEED, MOST_THREADS

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.models.load import Source

Model = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, a checkpoint, a model.pt, or the weights of --factory; none where it loads them.",
        show_default=False,
    ),
]
BundleFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A bundle made by tfmq-export.")]
Factory = Annotated[
    str | None,
    typer.Option(help="Function that returns (module, draw) or (module, Description): package.module:build."),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Which weights: of a folder fp16, non_ema, ...; of a file raw, without EMA.", show_default="the usual"
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:SCALE]", help="Fuse this LoRA into the weights first; may be given several times."),
]
Pipeline = Annotated[
    Path | None,
    typer.Option(
        help="Pipeline folder to run the denoiser of MODEL in, with its text encoders and VAE.", show_default=False
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Number of denoising steps; the bundle serves their timesteps.", show_default="50")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, plms, pndm, dpm++, unipc, euler, euler-a, heun, ddpm, flow, own (the model's), or a "
        "scheduler_config.json.",
        show_default="a pipeline's own; of a single model ddim, or flow",
    ),
]
Conditioning = Annotated[Path | None, typer.Option(help="Prompt embeddings to calibrate with (safetensors).")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="List of prompts for a pipeline: one a line, or JSON lines of its call arguments.",
        show_default="64 of our own",
    ),
]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", show_default="the model's")]
Against = Annotated[Path, typer.Option(help="The full-precision model the bundle came from.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log each step (-vv: each layer).")
]
Threads = Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="Threads of the engine.")]
JsonFile = Annotated[Path | None, typer.Option(help="Write all figures to this JSON file; - for standard output.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the starting noise.")]
MinPsnr = Annotated[float | None, typer.Option(help="Fail below this mean PSNR of the images, dB.")]
MinSsim = Annotated[float | None, typer.Option(help="Fail below this mean SSIM of the images.")]
MinSqnr = Annotated[float | None, typer.Option(help="Fail below this mean noise-prediction SQNR, dB.")]
MinGuidance = Annotated[
    float | None,
    typer.Option(help="Fail if less than this share of guidance (what the prompt changes) is kept, on average."),
]
MaxLpips = Annotated[float | None, typer.Option(help="Fail above this mean ST-LPIPS of the images.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"tfmq-export {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


STDOUT = Path("-")
"""In place of a file: standard output."""


def write_figures(figures: Mapping[str, object], file: Path) -> None:
    """Write JSON into a file, replaced in one step, or to standard output."""
    text = json.dumps(figures, indent=1) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
        return
    with replaced_file(file) as partial:
        partial.write_text(text, "utf-8")


@contextmanager
def answering(file: Path | None) -> Iterator[dict[str, object]]:
    """What a command found, as data: put it into the mapping; it is written at the end, where ``--json`` asks for it.

    While standard output is for data, what is printed for people goes to standard error.
    """
    found: dict[str, object] = {}
    with people_on_stderr(file == STDOUT):
        yield found
    if file is not None:
        write_figures(found, file)


def require_folder_of(*files: Path | None) -> None:
    """Refuse a file that cannot be written for want of its folder, now and not after the work.

    Raises:
        OutputError: its folder is not there.
    """
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: no folder {file.parent}; make it, or choose another place")


def source_of(
    bundle: "Bundle",
    against: Path | None,
    factory: str | None,
    *,
    variant: str | None,
    lora: list[str] | None,
    pipeline: Path | None,
) -> "Source":
    """The float model, sampled the way the bundle is."""
    from tfmq_export.models.load import source_of as of_bundle

    return of_bundle(bundle, against, factory, variant=variant, lora=lora or (), pipeline=pipeline)
