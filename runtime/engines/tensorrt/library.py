"""TensorRT and TensorRT-RTX; the only file that imports them, for what runs engines and for what builds them."""

import importlib.util
from collections.abc import Callable
from typing import Any

from tfmq_export.errors import DependencyError

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""Names of the libraries by what picks them."""

MISSING = (
    "{target}: TensorRT-RTX is not installed, whose engine proves without a GPU what runs in int8; "
    "pip install 'tfmq-export[tensorrt-rtx]'"
)


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


def version(flavour: str) -> str:
    """Version of the installed library."""
    return str(import_tensorrt(flavour).__version__)


def can_prove() -> bool:
    """Whether TensorRT-RTX is here, which receipts need; it is not loaded, which takes its time."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def recorder(trt: Any, write: Callable[[str, str], None]) -> Any:
    """A logger of the library that hands on the severity and text of everything at once."""

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            write(severity.name, text)

    return Recorder()
