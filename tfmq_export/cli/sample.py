"""tfmq-sample: draw images with a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import bars, out, reports_errors
from tfmq_export.cli.options import (
    BundleFolder,
    Factory,
    JsonFile,
    Lora,
    Pipeline,
    Quiet,
    Seed,
    Threads,
    Variant,
    Version,
    answering,
    require_folder_of,
    source_of,
)
from tfmq_export.limits import MOST_IMAGES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tfmq_export.bundle.linear_walk import LinearWalk
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.progress import Progress
    from tfmq_export.runtime.sampler import DdimSchedule


@reports_errors
def sample(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write (PNG).")],
    images: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Number of images.")] = 8,
    seed: Seed = 0,
    threads: Threads = 2,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Another scheduler over the same timesteps, as in tfmq-export.", show_default="the bundle's"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Fewer steps over the same timesteps.", show_default="the bundle's")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this PNG, which must have the model's size.")] = None,
    strength: Annotated[float, typer.Option(help="With --image: the share of the steps that is run.")] = 0.5,
    against: Annotated[
        Path | None, typer.Option(help="The full-precision model; its images are drawn above, from the same noise.")
    ] = None,
    factory: Factory = None,
    variant: Variant = None,
    lora: Lora = None,
    pipeline: Pipeline = None,
    json: JsonFile = None,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Draw images with a bundle; with --against, full precision above and compiled below."""
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.bundle.pictures import is_picture
    from tfmq_export.bundle.write import replaced_file
    from tfmq_export.errors import ConfigError
    from tfmq_export.runtime.decode import decodes
    from tfmq_export.runtime.measure.compare import called
    from tfmq_export.runtime.picture import PER_ROW, png, strip
    from tfmq_export.runtime.sampler import schedule_of

    require_folder_of(output, json)
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: pictures are written as PNG; name it {output.with_suffix('.png').name}")
    opened = open_bundle(bundle)
    (sample,) = opened.manifest.input("sample")
    recorded = opened.manifest.call is not None
    if not recorded and not is_picture((None, *sample.shape)) and not decodes(opened, sample.shape):
        what = called((None, *sample.shape))
        raise ConfigError(
            f"{bundle}: draws {what} {list(sample.shape)}, not pictures, and has no decoder for them; compile the "
            "folder of its pipeline, whose VAE then goes into the bundle, or draw in Python (docs/sampling.md)"
        )
    beside = against is not None or factory is not None
    if beside and (image, scheduler, steps) != (None, None, None):
        raise ConfigError("--against draws as the bundle was compiled; leave out --image, --scheduler and --steps")
    schedule = None if recorded or (image, scheduler, steps) != (None, None, None) else schedule_of(opened)
    with bars(quiet) as progress:
        if not beside and schedule is not None:
            pictures = _in_numpy(opened, schedule, (images, *sample.shape), seed, threads, progress)
            rows = [("compiled", pictures)]
        else:
            from tfmq_export.proof.draw import Request, draw, draw_against, draw_in_pipeline

            request = Request(images, seed, threads, scheduler, steps, image, strength)
            if not beside:
                rows = [("compiled", (draw_in_pipeline if recorded else draw)(opened, request, progress))]
            else:
                source = source_of(opened, against, factory, variant=variant, lora=lora, pipeline=pipeline)
                rows = draw_against(opened, source, request, progress)
    with replaced_file(output) as partial:
        if len(rows) == 1:
            partial.write_bytes(png(strip(rows[0][1], min(images, PER_ROW))))
        else:
            from tfmq_export.proof.pictures import save_rows

            save_rows(partial, rows)
    with answering(json) as found:
        out.print(f"written to [bold]{escape(str(output))}[/]")
        found |= {"picture": str(output), "images": images, "seed": seed, "rows": [title for title, _ in rows]}


def _in_numpy(
    bundle: "Bundle",
    schedule: "DdimSchedule | LinearWalk",
    shape: tuple[int | None, ...],
    seed: int,
    threads: int,
    progress: "Progress",
) -> "NDArray[np.float32]":
    """Pictures in 0..1, [N, C, H, W], where the bundle's own scheduler needs no torch."""
    import numpy as np

    from tfmq_export.runtime.decode import looked_at
    from tfmq_export.runtime.draw import drawn, stored_prompts
    from tfmq_export.runtime.loaded import load

    size = tuple(side or 1 for side in shape)
    noise = np.random.default_rng(seed).standard_normal(size, np.float32)
    prompts = stored_prompts(bundle, len(noise))
    with load(bundle.root, threads=threads) as loaded, progress.stage("Sampling") as step:
        images = drawn(loaded, noise, schedule, prompts, progress=step)
    return looked_at(bundle, images, threads=threads)
