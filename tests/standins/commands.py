"""The commands in this process, as a user types them."""

from typer.testing import CliRunner, Result

from tfmq_export.cli import app_of


def run(command: str, *arguments: object) -> Result:
    """``run("sample", OUT, "-o", "grid.png")`` is ``tfmq-sample OUT -o grid.png``."""
    return CliRunner().invoke(app_of(command), [str(argument) for argument in arguments], catch_exceptions=False)
