"""TensorRT and TensorRT-RTX; the only file that imports them, for what runs engines and for what builds them."""

from collections.abc import Callable
from typing import Any

from tfmq_export.errors import DependencyError

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""Names of the libraries by what picks them."""


def import_tensorrt(flavour: str) -> Any:
    """The library's module.

    Raises:
        DependencyError: it is not installed, or does not load.
    """
    try:
        if flavour == "tensorrt-rtx":
            import tensorrt_rtx

            return tensorrt_rtx
        import tensorrt

        return tensorrt
    except ImportError as error:
        raise DependencyError(
            f"{FLAVOURS[flavour]} is not installed ({error}); pip install 'tfmq-export[{flavour}]'"
        ) from error


def recorder(trt: Any, write: Callable[[str, str], None]) -> Any:
    """A logger of the library that hands on the severity and text of everything at once."""

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            write(severity.name, text)

    return Recorder()
