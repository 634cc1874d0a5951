"""What the terminal shows: progress, tables, one-line errors, exit codes."""

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tfmq_export.errors import ConfigError, DependencyError, OutputError, TfmqError
from tfmq_export.progress import Step
from tfmq_export.report.numbers import seconds as as_time

P = ParamSpec("P")
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

INTERRUPTED, TERMINATED = 130, 143
COMPILING = frozenset(
    {
        "accelerate",
        "diffusers",
        "jinja2",
        "matplotlib",
        "ml_dtypes",
        "onnx",
        "onnx_graphsurgeon",
        "onnx_ir",
        "onnxscript",
    }
    | {"PIL", "safetensors", "torch", "yaml"}
)
"""What a host that only runs bundles does not have."""
EXTRAS: Mapping[str, frozenset[str]] = {
    "serve": frozenset({"ml_dtypes", "onnx"}),
    "bench": frozenset({"PIL", "matplotlib", "ml_dtypes", "onnx", "onnx_graphsurgeon"}),
    "report": frozenset({"PIL", "jinja2", "matplotlib", "safetensors"}),
}
"""What brings some of them, where it is less than what compiles."""
SERVED_BY = {"triton": "serve", "bench": "bench", "report": "report"}
"""Whose extra a command's packages are in."""


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one line and an exit code; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            _require_folder()
            command(*args, **kwargs)
        except TfmqError as error:
            fail(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in COMPILING:
                raise
            fail(DependencyError(f"this command needs {package}, {brought(package, command.__name__)}"))
        except OSError as error:  # a disk that is full or gone; anything else of ours is a TfmqError already
            fail(OutputError(f"{error.filename or 'output'}: {error.strerror or error}"))
        except KeyboardInterrupt:
            err.print("interrupted; nothing half-written was left behind", style="yellow")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def _require_folder() -> None:
    """Refuse a shell whose folder was deleted: libraries end the process there, with words about themselves."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the folder that this shell is in was deleted; cd to one that is there") from error


def brought(package: str, command: str) -> str:
    """What installs a package that a command lacks, behind its name."""
    extra = SERVED_BY.get(command, "compile")
    if package not in EXTRAS.get(extra, ()):
        extra = "compile"
    return f"which only '[{extra}]' installs; pip install 'tfmq-export[{extra}]'"


def fail(error: TfmqError) -> None:
    """Print one line and leave with the error's code."""
    err.print("[bold red]error:[/] ", end="")
    err.print(" ".join(str(error).split()), markup=False, highlight=False)
    raise typer.Exit(error.exit_code)


def _terminate(number: int, frame: FrameType | None) -> None:
    # Unwinds like Ctrl-C, so that temporary folders go.
    sys.exit(TERMINATED)


def set_up_logging(verbose: int) -> None:
    """-v shows a line per step, -vv one per layer."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=err, show_path=False)
    logging.getLogger("tfmq_export").setLevel(level)
    logging.getLogger("tfmq_export").addHandler(handler)


class Bars:
    """Draws a bar for each stage, with an estimate of what is left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._expected: dict[str, float] = {}
        self._whole: TaskID | None = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        self._expected = dict(seconds)
        self._whole = self._progress.add_task("In all", total=sum(seconds.values()))
        self._tell(0.0)

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        task = self._progress.add_task(title, total=None)
        expected = self._expected.pop(title, 0.0)

        def step(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)
            self._tell(expected * (1 - done / max(1, total)))

        self._tell(expected)
        yield step
        self._progress.update(task, total=1, completed=1)
        self._progress.stop_task(task)
        self._tell(0.0)

    def _tell(self, here: float) -> None:
        """How much is left of all stages, by the forecast; ``here`` of the one that runs."""
        if self._whole is None:
            return
        left, total = here + sum(self._expected.values()), self._progress.tasks[self._whole].total or 0.0
        said = f"In all, {as_time(left)} left" if left else "In all"
        self._progress.update(self._whole, completed=total - left, description=said)


class Lines:
    """Prints a line for each stage, where nobody watches a terminal."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        err.print(f"{title} ...")
        yield lambda done, total: None

    def expect(self, seconds: Mapping[str, float]) -> None:
        err.print(f"{as_time(sum(seconds.values()))} to go, as forecast")


@contextmanager
def bars(quiet: bool) -> Iterator[Bars | Lines]:
    """Progress on stderr: bars on a terminal, lines elsewhere, nothing when quiet."""
    if not err.is_terminal and not quiet:
        yield Lines()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet) as progress:
        yield Bars(progress)


@contextmanager
def people_on_stderr(data_on_stdout: bool) -> Iterator[None]:
    """Tables and lines for people go to stderr while stdout is for data."""
    before, out.stderr = out.stderr, data_on_stdout
    try:
        yield
    finally:
        out.stderr = before


def table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> None:
    """Print rows as they are; numbers are the caller's strings."""
    grid = Table(title=escape(title), title_justify="left", show_header=header is not None, box=None, pad_edge=False)
    for column in header or rows[0]:
        grid.add_column(column if header else "")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    out.print(grid)
