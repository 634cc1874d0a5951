"""The commands in this process, as a user types them."""

import importlib

import typer
from typer.testing import CliRunner, Result


def run(command: str, *arguments: object) -> Result:
    """``run("sample", OUT, "-o", "grid.png")`` is ``tfmq-sample OUT -o grid.png``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(getattr(importlib.import_module(f"tfmq_export.cli.{command}"), command))
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
