"""Every error this package raises on purpose.

Each message says what, where and what next, in one line. The command line prints that line and
exits with the class's ``exit_code``; any other exception is a bug of ours and keeps its traceback.
"""

from typing import ClassVar


class TfmqError(Exception):
    """Root of the errors below."""

    exit_code: ClassVar[int] = 4


class ConfigError(TfmqError):
    """An option, a preset or a schedule that cannot be used."""

    exit_code = 2


class DependencyError(TfmqError):
    """An optional package that this command needs is not installed."""

    exit_code = 2


class LoadError(TfmqError):
    """A model, bundle or conditioning file that cannot be read."""

    exit_code = 3


class TimestepError(ConfigError):
    """A timestep outside the finite set a bundle was built for."""


class CalibrationError(TfmqError):
    """Calibration saw data that no range can be drawn from."""


class RecipeError(TfmqError):
    """A recipe that is invalid or belongs to another model."""


class ExportError(TfmqError):
    """The model cannot be captured or written as ONNX."""


class OutputError(TfmqError):
    """The output folder cannot be written."""


class TargetError(TfmqError):
    """The backend cannot run what the recipe asks for."""


class PassError(TfmqError):
    """A graph pass that could not do its work."""


class PreconditionError(PassError):
    """The graph is not what the pass needs."""


class PostconditionError(PassError):
    """The pass ran and its law does not hold."""


class BuildError(TfmqError):
    """The backend refused the graph."""

    exit_code = 5


class AccuracyError(TfmqError):
    """The compiled model misses an accuracy threshold."""

    exit_code = 6


class PrecisionError(TfmqError):
    """The precision realized by the backend is not the one asked for."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """One line of somebody else's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
