"""A command is told as it was typed: what was given, no defaults, ready for a shell."""

import shlex
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tfmq_export.cli.typed import command_line


def told(*words: str) -> str:
    app = typer.Typer()

    @app.command()
    def toy(
        context: typer.Context,
        model: str,
        lora: Annotated[list[str] | None, typer.Option()] = None,
        steps: int = 50,
        prologue: Annotated[bool | None, typer.Option()] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    ) -> None:
        print(command_line(context, "export"))

    return CliRunner().invoke(app, words, catch_exceptions=False).output.strip()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("m.pt", "m.pt"),
        ("'my model.pt' -q", "'my model.pt'"),
        ("m.pt --lora a --lora b --steps 50", "m.pt --lora a --lora b --steps 50"),
        ("m.pt --no-prologue", "m.pt --no-prologue"),
        ("m.pt --prologue", "m.pt --prologue"),
    ],
)
def test_a_command_is_told_as_it_was_typed(typed: str, said: str) -> None:
    assert told(*shlex.split(typed)) == f"tfmq-export {said}"
