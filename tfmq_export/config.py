"""What a user may ask of the compiler: presets, a TOML file, flags."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tfmq_export.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Preset:
    """A pair of widths; 0 keeps everything in floating point."""

    weight_bits: int
    activation_bits: int


PRESETS: Mapping[str, Preset] = {
    "w8a8": Preset(8, 8),
    "w4a8": Preset(4, 8),
    "w4a6": Preset(4, 6),
    "fp32": Preset(0, 0),
}


class Thresholds(BaseModel):
    """Bounds a compiled model must keep; missing one exits with 6.

    The floors below catch a broken build. A release gate sets its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    psnr: float = Field(10.0, description="mean PSNR of the images, dB")
    ssim: float = Field(0.0, description="mean SSIM of the images")
    sqnr: float = Field(0.0, description="noise-prediction SQNR, mean over the timesteps, dB")
    temporal_cosine: float = Field(0.999999, description="lowest cosine of any temporal feature at any timestep")
    agreement: float = Field(40.0, description="lowest SQNR of the graph against PyTorch fake-quant, in lock-step, dB")


class CompileConfig(BaseModel):
    """Everything the compiler can be asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = "w8a8"
    target: str = "ort-cpu"
    estimator: Literal["mse", "minmax"] = "mse"
    calibration_images: int = Field(16, ge=1)
    validation_images: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)
    thresholds: Thresholds = Thresholds.model_construct()
    allow_precision_loss: bool = False

    def model_post_init(self, context: Any, /) -> None:
        """Check the names that pydantic cannot know."""
        find_preset(self.preset)


def find_preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        ConfigError: there is none of that name; suggests the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]


def load_config(path: Path | None, flags: Mapping[str, Any]) -> CompileConfig:
    """A TOML file under the flags that were given (None means not given).

    Raises:
        ConfigError: an unreadable file, an unknown key (suggests the nearest) or a value out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not readable TOML: {error}") from error
    thresholds = values.pop("thresholds", {})
    if not isinstance(thresholds, dict):
        raise ConfigError(f"{path}: thresholds: expected a table [thresholds], got {thresholds!r}")
    for key, value in flags.items():
        if value is not None:
            group, _, inner = key.partition(".")
            if inner:
                thresholds[inner] = value
            else:
                values[group] = value
    try:
        return CompileConfig(**values, thresholds=Thresholds(**thresholds))
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def _explain(error: ValidationError, path: Path | None) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{path}: " if path is not None else ""
    if first["type"] == "extra_forbidden":
        known = [*CompileConfig.model_fields, *Thresholds.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"{where}unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{where}{key}: {first['msg']}, got {first['input']!r}"
