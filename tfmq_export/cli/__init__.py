"""The commands, one file each: tfmq-export, tfmq-validate, tfmq-sample, tfmq-bench, tfmq-build, tfmq-pack.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from collections.abc import Callable

import typer


def _run(command: Callable[..., None]) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=command.__doc__)(command)
    app()


def export_main() -> None:
    """Entry point of tfmq-export."""
    from tfmq_export.cli.export import export

    _run(export)


def validate_main() -> None:
    """Entry point of tfmq-validate."""
    from tfmq_export.cli.validate import validate

    _run(validate)


def sample_main() -> None:
    """Entry point of tfmq-sample."""
    from tfmq_export.cli.sample import sample

    _run(sample)


def bench_main() -> None:
    """Entry point of tfmq-bench."""
    from tfmq_export.cli.bench import bench

    _run(bench)


def build_main() -> None:
    """Entry point of tfmq-build."""
    from tfmq_export.cli.build import build

    _run(build)


def pack_main() -> None:
    """Entry point of tfmq-pack."""
    from tfmq_export.cli.pack import pack

    _run(pack)
