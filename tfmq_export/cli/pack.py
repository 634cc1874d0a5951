"""tfmq-pack: pack a diffusers folder into one file."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import out, reports_errors
from tfmq_export.cli.options import (
    Conditioning,
    Guidance,
    JsonFile,
    Lora,
    Variant,
    Version,
    answering,
    require_folder_of,
)
from tfmq_export.report.numbers import size


@reports_errors
def pack(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="A diffusers folder, or a checkpoint in one file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    lora: Lora = None,
    json: JsonFile = None,
    version: Version = False,
) -> None:
    """Pack a diffusers folder or a checkpoint into one model.pt of plain data."""
    from tfmq_export.models.layouts.find import find_layout
    from tfmq_export.models.layouts.lora import LoraFile, fuse
    from tfmq_export.models.layouts.read import read_layout
    from tfmq_export.models.model_pt import write_checkpoint
    from tfmq_export.models.prompts import read_prompts

    require_folder_of(output, json)
    opened = read_layout(find_layout(folder, variant))
    model = opened.model
    notes = [*opened.notes, *(fuse(model, LoraFile.of(each)) for each in lora or ())]
    prompts = opened.prompts
    if conditioning is not None:
        prompts = read_prompts(conditioning, prompts.guidance_scale)
    if guidance_scale is not None:
        prompts = replace(prompts, guidance_scale=guidance_scale)
    write_checkpoint(output, model, dict(opened.scheduler), prompts)
    name, written = type(model).__name__, output.stat().st_size
    with answering(json) as found:
        for note in notes:
            out.print(note, markup=False)
        out.print(f"packed {name} into [bold]{escape(str(output))}[/] ({size(written)})")
        found |= {"file": str(output), "class": name, "bytes": written, "notes": notes}
