"""tfmq-export: compile a model into a bundle, and check it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tfmq_export.cli.console import bars, err, out, reports_errors
from tfmq_export.cli.forecast import show_forecast
from tfmq_export.cli.options import (
    Conditioning,
    Factory,
    Guidance,
    JsonFile,
    Lora,
    Model,
    Pipeline,
    Prompts,
    Quiet,
    Scheduler,
    Steps,
    Variant,
    Verbose,
    Version,
    answering,
    require_folder_of,
)
from tfmq_export.cli.result import show
from tfmq_export.cli.settings import takes_settings
from tfmq_export.cli.typed import command_line
from tfmq_export.errors import ConfigError
from tfmq_export.recipe.plain import read_json

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.compiler.chain import Compiled
    from tfmq_export.config import CompileConfig
    from tfmq_export.serving.options import Serving

UNSAID = frozenset({"model", "weights", "config", "model_index", "diffusion_pytorch_model", "unet", "transformer"})
"""Names that many models have."""


@takes_settings
@reports_errors
def export(
    context: typer.Context,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="out/MODEL-PRESET[-TARGET]")
    ] = None,
    *,
    settings: Mapping[str, Any],
    steps: Steps = None,
    scheduler: Scheduler = None,
    prompts: Prompts = None,
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
    factory: Factory = None,
    variant: Variant = None,
    lora: Lora = None,
    pipeline: Pipeline = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Start from the recipe of an earlier bundle: its scales, integers and tables.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it would take: time, memory and disk of every stage."),
    ] = False,
    triton: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add it as this model to the Triton repository beside OUT.")
    ] = None,
    dump_dir: Annotated[Path | None, typer.Option(help="Save the graph after every pass in this folder.")] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    version: Version = False,
) -> None:
    """Compile a diffusion model into a quantized ONNX bundle; check that it runs in integers; compare its images."""
    from tfmq_export.config import load_config

    if model is None and factory is None:
        raise ConfigError("no MODEL: give a folder or a file, or --factory package.module:build that builds one")
    asked = load_config(config, settings)
    words = [default_name(model, factory), _preset(asked, recipe), *_other_target(asked.target)]
    root = output or Path("out") / "-".join(words)
    serving = None if triton is None else _servable(asked.target, triton)
    require_folder_of(json)

    with bars(quiet) as progress:
        with progress.stage("Starting"):
            from tfmq_export.compiler.chain import checkpoint_of, compile_model, foresee
            from tfmq_export.models.load import Source
        source = Source(
            model,
            factory,
            steps,
            conditioning,
            guidance_scale,
            scheduler,
            prompts,
            variant,
            tuple(lora or ()),
            pipeline,
        )
        if dry_run:
            expected = foresee(source, root, asked, recipe=recipe, progress=progress)
        else:
            try:
                made = compile_model(
                    source,
                    root,
                    asked,
                    recipe=recipe,
                    resume=resume,
                    dump_dir=dump_dir,
                    progress=progress,
                    command=command_line(context, "export"),
                )
            except (KeyboardInterrupt, SystemExit):
                if checkpoint_of(root).exists():
                    kept = escape(str(checkpoint_of(root)))
                    err.print(f"finished blocks are kept in {kept}: the same command with --resume goes on")
                raise
    with answering(json) as found:
        if dry_run:
            show_forecast(expected, root)
            found |= expected.to_json()
        else:
            _say(made, root, serving)
            found |= {"bundle": str(root), **read_json(made.bundle.report)}


def _say(made: "Compiled", root: Path, serving: "Serving | None") -> None:
    show(made.bundle, made.validation)
    out.print(f"\nwritten to [bold]{escape(str(root))}[/] in {sum(made.seconds.values()):.0f} s")
    _how_to_build(made.bundle)
    if serving is not None:
        from tfmq_export.cli.triton import add_to_repository

        add_to_repository(made.bundle, root.absolute().parent / "triton", serving)
    out.print(f"report: {root / 'tfmq' / 'report.html'}", markup=False, highlight=False)


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
    if target.engine == "qnn":
        out.print(f"context binaries for phones, built here: tfmq-build {bundle.root} --qnn sm8550", markup=False)
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
        return "auto" if settings.auto else settings.preset
    from tfmq_export.recipe.io import load_recipe

    return load_recipe(recipe).preset


def _other_target(target: str) -> list[str]:
    """In a default name: beside the bundle its recipe came from, not over it."""
    from tfmq_export.config import CompileConfig

    return [] if target == CompileConfig.model_fields["target"].default else [target]


def default_name(model: Path | None, factory: str | None) -> str:
    """A bundle's default name: of the folder, or of a file that is not called as all are; of the factory's module."""
    if model is None:
        return str(factory).partition(":")[0].rpartition(".")[2]
    path = Path(os.path.abspath(model))  # a link keeps its name
    if path.is_file() and path.name.partition(".")[0] not in UNSAID:
        return path.stem
    folder = path.parent if path.is_file() else path
    while folder.name in (*UNSAID, "snapshots") or folder.parent.name == "snapshots":  # of a cache of the hub
        folder = folder.parent
    return folder.name.rpartition("--")[2] or "model"
