"""Which of a bundle's engines runs on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfmq_export.bundle.manifest import EngineInfo
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.tensorrt.library import FLAVOURS


@dataclass(frozen=True, slots=True)
class EngineHost:
    """What decides whether an engine runs here.

    Attributes:
        flavour: The library asked for, "tensorrt" or "tensorrt-rtx".
        version: Of that library.
        capability: Compute capability of the GPU, such as 89.
    """

    flavour: str
    version: str
    capability: int

    def why_not(self, engine: EngineInfo) -> str:
        """The reason why an engine cannot run here; empty where it can."""
        if engine.flavour != self.flavour:
            return f"for {FLAVOURS[engine.flavour]}"
        if engine.version != self.version:
            return f"of {FLAVOURS[engine.flavour]} {engine.version}, {self.version} is installed"
        if self.capability not in engine.compute_capabilities:
            built = ", ".join(map(str, engine.compute_capabilities))
            return f"for SM {built}, this GPU is SM {self.capability}"
        return ""


def choose_engine(engines: Sequence[EngineInfo], host: EngineHost) -> EngineInfo:
    """The engine built for the fewest other GPUs among those that run here.

    Raises:
        ConfigError: there is none, with the reason for each.
    """
    fitting = [each for each in engines if not host.why_not(each)]
    if fitting:
        return min(fitting, key=lambda each: len(each.compute_capabilities))
    reasons = "; ".join(f"{Path(each.file).name}: {host.why_not(each)}" for each in engines) or "none was built"
    raise ConfigError(f"no engine of this bundle runs here ({reasons}); build one with tfmq-build")
