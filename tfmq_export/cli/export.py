"""tfmq-export: compile a model into a bundle, and check it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import bars, err, out, reports_errors, set_up_logging
from tfmq_export.cli.options import (
    Conditioning,
    Factory,
    Guidance,
    MinPsnr,
    MinSqnr,
    MinSsim,
    Model,
    Quiet,
    Scheduler,
    Steps,
    Verbose,
    Version,
)
from tfmq_export.cli.result import show

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.config import CompileConfig
    from tfmq_export.serving.options import Serving


@reports_errors
def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="out/MODEL-PRESET[-TARGET]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="w8a8, w4a8, w4a6 or fp32.", show_default="w8a8")] = None,
    target: Annotated[
        str | None, typer.Option(help="ort-cpu, openvino, tensorrt-rtx, tensorrt or ort-cuda.", show_default="ort-cpu")
    ] = None,
    steps: Steps = None,
    scheduler: Scheduler = None,
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
    factory: Factory = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Start from the recipe of an earlier bundle: its scales, integers and tables.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags win.")] = None,
    effort: Annotated[str | None, typer.Option(help="fast, standard or paper.", show_default="standard")] = None,
    tib: Annotated[
        str | None, typer.Option(help="Temporal features: table, quantized or select.", show_default="table")
    ] = None,
    les: Annotated[
        str | None,
        typer.Option(
            help="Equivalent scaling: adaptive, uniform, linear, quadratic, smoothquant or off.",
            show_default="uniform",
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
    cpus: Annotated[
        str | None,
        typer.Option(
            help="x86 CPUs that the integers are right on: any, or vnni (a little closer to full precision there, "
            "wrong elsewhere).",
            show_default="any",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="What attention's two products compute in: float, integer or auto.", show_default="auto"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where to quantize: cpu, cuda, or auto: a GPU if there is one.", show_default="auto"),
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
    tables: Annotated[
        str | None, typer.Option(help="Rows of temporal tables: fp32, fp16 or int8.", show_default="fp32")
    ] = None,
    class_tables: Annotated[
        bool | None,
        typer.Option("--class-tables", help="Tabulate what class label and timestep decide, where it is small."),
    ] = None,
    prologue: Annotated[
        bool | None,
        typer.Option("--prologue", help="Put what the prompt decides into a graph of its own, run once per prompt."),
    ] = None,
    triton: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add it as this model to the Triton repository beside OUT.")
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(
            help="A pipeline's text encoder, VAE, ...: link (large files as hard links), copy, onnx (with ONNX twins "
            "for optimum) or none.",
            show_default="link",
        ),
    ] = None,
    dump_dir: Annotated[Path | None, typer.Option(help="Save the graph after every pass in this folder.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    version: Version = False,
) -> None:
    """Compile a diffusion model into a quantized ONNX bundle; check that it runs in integers; compare its images."""
    from tfmq_export.config import load_config

    flags = {
        "preset": preset,
        "target": target,
        "effort": effort,
        "method.tib": tib,
        "method.les": les,
        "method.pts": pts,
        "method.estimator": estimator,
        "method.cpus": cpus,
        "method.attention": attention,
        "pts_lowering": pts_lowering,
        "device": device,
        "max_memory": max_memory,
        "calibration_images": calibration_images,
        "validation_images": validation_images,
        "seed": seed,
        "thresholds.psnr": min_psnr,
        "thresholds.ssim": min_ssim,
        "thresholds.sqnr": min_sqnr,
        "allow_precision_loss": allow_precision_loss,
        "tables": tables,
        "class_tables": class_tables,
        "prologue": prologue,
        "components": components,
    }
    settings = load_config(config, flags)
    set_up_logging(verbose)
    root = output or Path("out") / "-".join([_name(model), _preset(settings, recipe), *_other_target(settings.target)])
    serving = None if triton is None else _servable(settings.target, triton)

    with bars(quiet) as progress:
        with progress.stage("Starting"):
            from tfmq_export.compiler.chain import checkpoint_of, compile_model
            from tfmq_export.models.load import Source
        source = Source(model, factory, steps, conditioning, guidance_scale, scheduler)
        try:
            made = compile_model(
                source, root, settings, recipe=recipe, resume=resume, dump_dir=dump_dir, progress=progress
            )
        except (KeyboardInterrupt, SystemExit):
            if checkpoint_of(root).exists():
                kept = escape(str(checkpoint_of(root)))
                err.print(f"finished blocks are kept in {kept}: the same command with --resume goes on")
            raise
    show(made.bundle, made.validation)
    out.print(f"\nwritten to [bold]{escape(str(root))}[/] in {sum(made.seconds.values()):.0f} s")
    if (root / "tfmq" / "samples.png").exists():
        out.print(f"look at it: {root / 'tfmq' / 'samples.png'}", markup=False)
    _how_to_build(made.bundle)
    if serving is not None:
        from tfmq_export.cli.triton import add_to_repository

        add_to_repository(made.bundle, root.absolute().parent / "triton", serving)


def _servable(target: str, name: str) -> "Serving":
    """How to serve it, refused now where no server runs it, not after hours of compiling."""
    from tfmq_export.serving.options import Serving, require_servable

    serving = Serving(name)
    require_servable(target, serving)
    return serving


def _how_to_build(bundle: "Bundle") -> None:
    """The commands that build what was not built here."""
    from tfmq_export.runtime.engines.tensorrt.building.trtexec import SCRIPT, build_commands
    from tfmq_export.target import find_target

    target = find_target(bundle.manifest.target)
    if target.engine != "tensorrt" or bundle.manifest.engines:
        return
    if not target.built_in_place:
        out.print(f"engines for any list of GPUs, built here: tfmq-build {bundle.root}", markup=False)
        return
    out.print("\nno engine was built: TensorRT or a GPU is not here. On the machine that will run it, either of")
    out.print(f"  tfmq-build {bundle.root} --tensorrt", markup=False)
    out.print(f"  sh {bundle.root / SCRIPT}", markup=False)
    out.print("which runs, in the bundle's folder,")
    for command in build_commands(bundle):
        out.print(command, markup=False, highlight=False)


def _preset(settings: "CompileConfig", recipe: Path | None) -> str:
    """What the bundle will be: a recipe has its own preset."""
    if recipe is None:
        return settings.preset
    from tfmq_export.recipe.io import load_recipe

    return load_recipe(recipe).preset


def _other_target(target: str) -> list[str]:
    """In a default name: beside the bundle its recipe came from, not over it."""
    from tfmq_export.config import CompileConfig

    return [] if target == CompileConfig.model_fields["target"].default else [target]


def _name(model: Path) -> str:
    """A bundle's default name: of the folder, where the file is just called model.pt."""
    path = model.absolute()
    return path.parent.name if path.stem in ("model", "weights") else path.stem
