"""The commands, one file each: ``tfmq-NAME`` is the function NAME of ``cli/NAME.py``.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

import importlib

import typer
from rich.markup import escape

from tfmq_export.cli.help import epilog, in_panels


def app_of(name: str) -> typer.Typer:
    """A command, ready to run."""
    command = getattr(importlib.import_module(f"tfmq_export.cli.{name}"), name)
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")
    names = {"help_option_names": ["-h", "--help"]}
    app.command(help=escape(command.__doc__), epilog=escape(epilog(name)), context_settings=names)(in_panels(command))
    return app


def export_main() -> None:
    """Entry point of tfmq-export."""
    app_of("export")()


def validate_main() -> None:
    """Entry point of tfmq-validate."""
    app_of("validate")()


def sample_main() -> None:
    """Entry point of tfmq-sample."""
    app_of("sample")()


def bench_main() -> None:
    """Entry point of tfmq-bench."""
    app_of("bench")()


def build_main() -> None:
    """Entry point of tfmq-build."""
    app_of("build")()


def pack_main() -> None:
    """Entry point of tfmq-pack."""
    app_of("pack")()


def triton_main() -> None:
    """Entry point of tfmq-triton."""
    app_of("triton")()


def golden_main() -> None:
    """Entry point of tfmq-golden."""
    app_of("golden")()


def report_main() -> None:
    """Entry point of tfmq-report."""
    app_of("report")()
