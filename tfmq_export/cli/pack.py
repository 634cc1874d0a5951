"""tfmq-pack: pack a diffusers folder into one file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tfmq_export.cli.console import out, reports_errors, size
from tfmq_export.cli.options import Conditioning, Guidance, require_folder_of


@reports_errors
def pack(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A diffusers model or pipeline folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    conditioning: Conditioning = None,
    guidance_scale: Guidance = None,
) -> None:
    """Pack a diffusers folder into one model.pt of plain data."""
    from tfmq_export.models.folder import read_folder
    from tfmq_export.models.model_pt import write_checkpoint
    from tfmq_export.models.prompts import PromptSet, read_prompts

    require_folder_of(output)
    model, scheduler = read_folder(folder)
    prompts = PromptSet() if conditioning is None else read_prompts(conditioning, guidance_scale)
    write_checkpoint(output, model, scheduler, prompts)
    out.print(f"packed {type(model).__name__} into [bold]{escape(str(output))}[/] ({size(output.stat().st_size)})")
