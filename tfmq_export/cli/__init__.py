"""The commands, one file each: ``tfmq-NAME`` is the function NAME of ``cli/NAME.py``.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

import importlib

import typer


def app_of(name: str) -> typer.Typer:
    """A command, ready to run."""
    command = getattr(importlib.import_module(f"tfmq_export.cli.{name}"), name)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=command.__doc__, context_settings={"help_option_names": ["-h", "--help"]})(command)
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
