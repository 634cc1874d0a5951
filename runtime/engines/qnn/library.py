"""onnxruntime-qnn, a plugin of ONNX Runtime; the only file that imports it."""

import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.runtime.engines.onnxruntime.runner import engine_errors, import_onnxruntime

PROVIDER = "QNNExecutionProvider"
MISSING = (
    "{target}: onnxruntime-qnn is not installed, whose emulator shows without a phone what runs on Hexagon; "
    "pip install --no-deps onnxruntime-qnn (beside the onnxruntime that is there), or 'tfmq-export[qnn]' where none is"
)
CHIPS = {"sm8350": 30, "sm8450": 36, "sm8550": 43, "sm8650": 57, "sm8750": 69}
"""Snapdragon chips and the numbers that Qualcomm's compiler knows them by."""
USUAL_CHIP = "sm8550"
"""What graphs are compiled for where nobody says: without a chip the compiler takes the oldest, which has no floats."""

_registering = threading.Lock()


@dataclass(frozen=True, slots=True)
class Library:
    """What a session on the NPU is made with.

    Attributes:
        onnxruntime: The module.
        devices: That the plugin offers: the NPU, or this CPU for its emulator.
        version: Of the plugin.
        toolchain: Version of Qualcomm's libraries in it.
    """

    onnxruntime: ModuleType
    devices: tuple[Any, ...]
    version: str
    toolchain: str

    @property
    def emulated(self) -> bool:
        """Whether there is no NPU here."""
        kinds = self.onnxruntime.OrtHardwareDeviceType
        return all(device.device.type != kinds.NPU for device in self.devices)


@cache
def library() -> Library:
    """Load the plugin into ONNX Runtime; later calls give the same.

    Raises:
        DependencyError: it is not installed, or does not load.
    """
    onnxruntime = import_onnxruntime()
    try:
        import onnxruntime_qnn
        from onnxruntime_qnn import build_and_package_info as build
    except ImportError as error:
        raise DependencyError(MISSING.format(target="qnn")) from error
    with _registering:
        try:
            onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        except engine_errors() as error:
            raise DependencyError(f"onnxruntime-qnn does not load: {error}") from error
    devices = tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER)
    if not devices:
        raise DependencyError("onnxruntime-qnn offers no device here; use a 64-bit Linux or Windows on x86 or ARM")
    return Library(onnxruntime, devices, str(onnxruntime_qnn.__version__), str(build.qnn_version))


def version() -> str:
    """Version of the plugin, and of Qualcomm's libraries in it."""
    found = library()
    return f"{found.version} (QNN {found.toolchain})"


def is_here() -> bool:
    """Whether graphs can be compiled and emulated here."""
    try:
        library()
    except DependencyError:
        return False
    return True


def has_npu() -> bool:
    """Whether there is a Hexagon NPU to run on, not its emulator alone."""
    return is_here() and not library().emulated


def chip_number(chip: str) -> int:
    """Qualcomm's number of a chip.

    Raises:
        ConfigError: it is not in the list.
    """
    if chip.lower() not in CHIPS:
        raise ConfigError(f"chip {chip!r} is unknown; there is {', '.join(CHIPS)}")
    return CHIPS[chip.lower()]
