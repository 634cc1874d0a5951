"""The commands: tfmq-export, tfmq-validate, tfmq-sample, tfmq-bench, tfmq-pack.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_export import __version__
from tfmq_export.console import bars, err, out, reports_errors, set_up_logging, size, table

if TYPE_CHECKING:
    from tfmq_export.bundle import Bundle
    from tfmq_export.models.load import Source
    from tfmq_export.validate import Validation

Model = Annotated[Path, typer.Argument(help="model.pt, a diffusers folder, or the weights of --factory.")]
BundleFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A bundle made by tfmq-export.")]
Factory = Annotated[str | None, typer.Option(help="package.module:build that returns (module, Description).")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps the bundle serves.", show_default="50")]
Conditioning = Annotated[Path | None, typer.Option(help="Prompt embeddings to calibrate with (safetensors).")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", show_default="the model's")]
Against = Annotated[Path, typer.Option(help="The full-precision model the bundle came from.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log each step (-vv: each layer).")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the engine.")]
MinPsnr = Annotated[float | None, typer.Option(help="Fail below this mean PSNR of the images, dB.")]
MinSsim = Annotated[float | None, typer.Option(help="Fail below this mean SSIM of the images.")]
MinSqnr = Annotated[float | None, typer.Option(help="Fail below this mean noise-prediction SQNR, dB.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"tfmq-export {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@reports_errors
def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="out/MODEL-PRESET")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="w8a8, w4a8, w4a6 or fp32.", show_default="w8a8")] = None,
    target: Annotated[
        str | None, typer.Option(help="ort-cpu, openvino, tensorrt-rtx, tensorrt or ort-cuda.", show_default="ort-cpu")
    ] = None,
    steps: Steps = None,
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
    factory: Factory = None,
    recipe: Annotated[Path | None, typer.Option(help="Reuse the recipe of an earlier bundle.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags win.")] = None,
    effort: Annotated[str | None, typer.Option(help="fast, standard or paper.", show_default="standard")] = None,
    tib: Annotated[
        str | None, typer.Option(help="Temporal features: table, quantized or select.", show_default="table")
    ] = None,
    les: Annotated[
        str | None,
        typer.Option(
            help="Equivalent scaling: adaptive, uniform, linear, quadratic, smoothquant or off.",
            show_default="adaptive",
        ),
    ] = None,
    pts: Annotated[
        str | None, typer.Option(help="Power-of-two scaling: vote, mse or off.", show_default="vote")
    ] = None,
    pts_lowering: Annotated[
        str | None, typer.Option(help="Its form in the graph: fold, shift, split or auto.", show_default="auto")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Activation ranges: mse, minmax, kl or percentile.", show_default="mse")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="Ceiling on cached activations, e.g. 2GiB; the rest goes to disk.")
    ] = None,
    calibration_images: Annotated[int | None, typer.Option(help="Trajectories to calibrate on.")] = None,
    validation_images: Annotated[int | None, typer.Option(help="Images to compare at the end.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of noise and sampling.", show_default="0")] = None,
    min_psnr: MinPsnr = None,
    min_ssim: MinSsim = None,
    min_sqnr: MinSqnr = None,
    allow_precision_loss: Annotated[
        bool | None,
        typer.Option("--allow-precision-loss", help="Keep a bundle whose layers do not all run in integers."),
    ] = None,
    class_tables: Annotated[
        bool | None,
        typer.Option("--class-tables", help="Tabulate what class label and timestep decide, where it is small."),
    ] = None,
    prologue: Annotated[
        bool | None,
        typer.Option("--prologue", help="Put what the prompt decides into a graph of its own, run once per prompt."),
    ] = None,
    dump_dir: Annotated[Path | None, typer.Option(help="Save the graph after every pass here.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    version: Version = False,
) -> None:
    """Compile a diffusion model into a quantized ONNX bundle, and prove it."""
    from tfmq_export.config import load_config

    flags = {
        "preset": preset,
        "target": target,
        "effort": effort,
        "method.tib": tib,
        "method.les": les,
        "method.pts": pts,
        "method.estimator": estimator,
        "pts_lowering": pts_lowering,
        "max_memory": max_memory,
        "calibration_images": calibration_images,
        "validation_images": validation_images,
        "seed": seed,
        "thresholds.psnr": min_psnr,
        "thresholds.ssim": min_ssim,
        "thresholds.sqnr": min_sqnr,
        "allow_precision_loss": allow_precision_loss,
        "class_tables": class_tables,
        "prologue": prologue,
    }
    settings = load_config(config, flags)
    set_up_logging(verbose)
    root = output or Path("out") / f"{_name(model)}-{settings.preset}"

    with bars(quiet) as progress:
        with progress.stage("Starting"):
            from tfmq_export.compiler import checkpoint_of, compile_model
            from tfmq_export.models.load import Source
        source = Source(model, factory, steps, conditioning, guidance_scale)
        try:
            made = compile_model(
                source, root, settings, recipe=recipe, resume=resume, dump_dir=dump_dir, progress=progress
            )
        except (KeyboardInterrupt, SystemExit):
            if checkpoint_of(root).exists():
                err.print(f"finished blocks are kept in {checkpoint_of(root)}: the same command with --resume goes on")
            raise
    _show(made.bundle, made.validation)
    out.print(f"\nwritten to [bold]{root}[/] in {sum(made.seconds.values()):.0f} s")
    if (root / "tfmq" / "samples.png").exists():
        out.print(f"look at it: {root / 'tfmq' / 'samples.png'}")


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
    with bars(quiet) as progress:
        with progress.stage("Loading"):
            from tfmq_export.models.load import load
            from tfmq_export.program import capture
            from tfmq_export.ptq.skip_concat import split_skip_concats
            from tfmq_export.recipe_io import load_recipe
            from tfmq_export.validate import Subject
            from tfmq_export.validate import validate as run_validation

            denoiser = load(_source_of(opened, against, factory))
        with progress.stage("Capturing the graph"):
            program = capture(denoiser)
        recipe = load_recipe(bundle)
        subject = Subject(denoiser, split_skip_concats(program, recipe.splits), recipe, opened)
        validation = run_validation(subject, thresholds, images=images, seed=seed, progress=progress)
    _show(opened, validation)
    if json is not None:
        validation.write(json)
    if not allow_precision_loss:
        validation.receipt.raise_if_lost()
    validation.report.raise_if_failed()


@reports_errors
def sample(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write (PNG).")],
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    threads: Threads = 2,
    against: Annotated[
        Path | None, typer.Option(help="Draw the full-precision model above, from the same noise.")
    ] = None,
    factory: Factory = None,
    quiet: Quiet = False,
) -> None:
    """Draw images with a bundle; with --against, full precision above and compiled below."""
    from tfmq_export.bundle import open_bundle
    from tfmq_export.pictures import is_picture, save_rows
    from tfmq_export.sampling import draw, draw_against

    opened = open_bundle(bundle)
    with bars(quiet) as progress:
        if against is None:
            rows = [("compiled", draw(opened, images, seed, threads, progress))]
        else:
            rows = draw_against(opened, _source_of(opened, against, factory), images, seed, threads, progress)
    if not is_picture(rows[0][1]):
        from tfmq_export.errors import ConfigError

        raise ConfigError(
            f"{bundle}: draws latents {list(rows[0][1].shape[1:])}, not pictures; decode them with the VAE"
        )
    partial = output.with_name(f".{output.name}.partial")
    try:
        save_rows(partial, rows)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    out.print(f"written to [bold]{output}[/]")


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
        source = None if against is None else _source_of(opened, against, factory)
        result = bench_bundle(opened, source, threads=threads, batch=batch, rounds=rounds, progress=progress)
    rows = [
        (name, f"{timing.median * 1e3:.2f}", f"{timing.p10 * 1e3:.2f}", f"{timing.p90 * 1e3:.2f}", f"{ratio:.2f}x")
        for (name, timing), ratio in zip(result.timings.items(), result.speedups.values(), strict=True)
    ]
    header = ("", "median ms", "p10", "p90", "speed")
    table(f"{bundle}: batch {batch}, {threads} thread(s), {rounds} interleaved rounds, {result.engine}", rows, header)
    if json is not None:
        result.write(json)


@reports_errors
def pack(
    folder: Annotated[Path, typer.Argument(help="A diffusers model or pipeline folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
) -> None:
    """Pack a diffusers folder into one model.pt of plain data."""
    from tfmq_export.models.checkpoint import write_checkpoint
    from tfmq_export.models.diffusers_model import PromptSet
    from tfmq_export.models.folder import read_folder, read_prompts

    model, scheduler = read_folder(folder)
    prompts = PromptSet() if conditioning is None else read_prompts(conditioning, guidance_scale)
    write_checkpoint(output, model, scheduler, prompts)
    out.print(f"packed {type(model).__name__} into [bold]{output}[/] ({size(output.stat().st_size)})")


def _name(model: Path) -> str:
    """A bundle's default name: of the folder, where the file is just called model.pt."""
    path = model.absolute()
    return path.parent.name if path.stem in ("model", "weights") else path.stem


def _source_of(bundle: "Bundle", against: Path, factory: str | None) -> "Source":
    """The float model, sampled the way the bundle is."""
    from tfmq_export.models.load import Source

    sampler = bundle.manifest.sampler
    if factory is not None:
        return Source(against, factory, sampler.steps)
    stored = bundle.root / "tfmq" / "conditioning.npz"
    conditioning = stored if stored.exists() and bundle.manifest.component == "unet" else None
    return Source(against, None, sampler.steps, conditioning, sampler.guidance_scale)


def _show(bundle: "Bundle", validation: "Validation") -> None:
    """The result for people."""
    manifest, receipt = bundle.manifest, validation.receipt
    by_name = {comparison.metric: comparison for comparison in validation.report.comparisons}
    psnr, ssim = by_name["image PSNR (dB)"], by_name.get("image SSIM")
    similarity = "" if ssim is None else f", SSIM {ssim.mean:.3f}"
    sqnr = by_name["noise-prediction SQNR per timestep (dB)"]
    cosine, agreement = by_name["temporal feature cosine"], by_name["agreement with fake-quant, lock-step (dB)"]
    convolutions, linears = receipt.counts("conv"), receipt.counts("linear")
    emulated = sorted({row.emulated for row in receipt.rows if row.emulated})
    rows = [
        ("images", f"PSNR {psnr.mean:.1f} dB (worst {psnr.lowest:.1f}){similarity}, {len(psnr.values)} images"),
        ("noise prediction", f"SQNR {sqnr.mean:.1f} dB, worst timestep {sqnr.lowest:.1f}"),
        ("temporal features", f"cosine {cosine.lowest:.7f} at worst, {len(manifest.timesteps)} timesteps"),
        ("graph = fake-quant", f"{agreement.lowest:.0f} dB at worst, layer by layer in lock-step"),
        (
            "in integers",
            f"{convolutions[0]}/{convolutions[1]} convolutions, {linears[0]}/{linears[1]} linear layers, "
            f"{receipt.integer_share:.1%} of the MACs",
        ),
        *(("note", text) for text in emulated),
        ("model.onnx", _sizes(bundle)),
        *_prologue_row(bundle),
    ]
    table(f"{manifest.source}: {manifest.preset} for {manifest.target}", rows)
    kept = [layer for layer in manifest.layers if layer.activation_bits == 0]
    for reason in sorted({layer.reason for layer in kept}):
        paths = [layer.path for layer in kept if layer.reason == reason]
        shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        out.print(f"in floating point: {len(paths)} layers ({shown}): {reason}")


def _prologue_row(bundle: "Bundle") -> list[tuple[str, str]]:
    """What runs once per prompt, where there is a graph for it."""
    info = bundle.manifest.prologue
    if info is None:
        return []
    memory = size(info.bytes_per_sample(len(bundle.manifest.timesteps)))
    proof = "bit for bit" if info.bit_equal else "up to rounding"
    return [
        (
            "prologue",
            f"{len(info.layers)} layers once per prompt, {info.share:.2%} of the MACs saved at each step; "
            f"passes {memory} per sample; equal to the single graph {proof}",
        )
    ]


def _sizes(bundle: "Bundle") -> str:
    graphs = [bundle.model] if bundle.prologue is None else [bundle.model, bundle.prologue]
    stored = sum(path.stat().st_size for graph in graphs for path in graph.parent.glob("model.onnx*"))
    full = bundle.manifest.weight_bytes
    return f"{size(stored)}, {stored / full:.3f} of the {size(full)} of fp32 weights"


def _app(command: Callable[..., None], help_panel: str) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=help_panel)(command)
    return app


def export_main() -> None:
    """Entry point of tfmq-export."""
    _app(export, export.__doc__ or "")()


def validate_main() -> None:
    """Entry point of tfmq-validate."""
    _app(validate, validate.__doc__ or "")()


def sample_main() -> None:
    """Entry point of tfmq-sample."""
    _app(sample, sample.__doc__ or "")()


def bench_main() -> None:
    """Entry point of tfmq-bench."""
    _app(bench, bench.__doc__ or "")()


def pack_main() -> None:
    """Entry point of tfmq-pack."""
    _app(pack, pack.__doc__ or "")()
