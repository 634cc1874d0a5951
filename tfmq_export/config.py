"""What a user may ask of the compiler: presets, a TOML file, flags."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, model_validator

from tfmq_export.errors import ConfigError
from tfmq_export.limits import LARGEST_SEED, MOST_IMAGES
from tfmq_export.recipe.plain import read_toml
from tfmq_export.recipe.recipe import TableType
from tfmq_export.target import PtsLowering

_UNITS = {"s": 1, "min": 60, "h": 3600}


def _duration(value: object) -> object:
    """``30min`` beside what pydantic takes for a time span."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", value) if isinstance(value, str) else None
    return timedelta(seconds=float(found[1]) * _UNITS[found[2]]) if found else value


Duration = Annotated[timedelta, BeforeValidator(_duration), Field(gt=timedelta(0))]
"""A length of time; as text a number and ``s``, ``min`` or ``h``."""


def _megabytes(value: object) -> object:
    """A plain number counts megabytes, as ``--max-size`` says."""
    try:
        return round(float(value) * 1e6)  # type: ignore[arg-type]  # what is no number is for pydantic to refuse
    except (TypeError, ValueError, OverflowError):
        return value


Megabytes = Annotated[ByteSize, BeforeValidator(_megabytes)]
"""A size in bytes; a number without a unit is one of 1,000,000 bytes."""

AUTO = "auto"
"""In place of a preset's name, where the bits of each layer were chosen."""

Components = Literal["link", "copy", "onnx", "none"]
"""How a pipeline's other components join its bundle: large files as hard links; all copied; linked, with
text encoder and VAE also as ONNX for optimum; or not at all."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A pair of widths; 0 keeps everything in floating point."""

    weight_bits: int
    activation_bits: int


PRESETS: Mapping[str, Preset] = {
    "w8a8": Preset(8, 8),
    "w4a8": Preset(4, 8),
    "w4a6": Preset(4, 6),
    "w8a16": Preset(8, 16),
    "w4a16": Preset(4, 16),
    "fp32": Preset(0, 0),
}


@dataclass(frozen=True, slots=True)
class Floors:
    """What a preset must reach unless the user says otherwise.

    Other pictures of the same set have 10 to 13 dB, a blur of 4 pixels 16; a preset's usual value is 5 to 10 dB above
    its floor (docs/validation.md).

    Attributes:
        psnr: Mean PSNR of the images, dB.
        sqnr: Mean SQNR of the noise prediction, dB.
    """

    psnr: float
    sqnr: float


FLOORS: Mapping[str, Floors] = {
    "w8a8": Floors(18.0, 20.0),
    "w4a8": Floors(15.0, 16.0),
    "w4a6": Floors(12.0, 12.0),
    "w8a16": Floors(18.0, 20.0),
    "w4a16": Floors(15.0, 16.0),
    "fp32": Floors(30.0, 40.0),
}
LOWEST = Floors(10.0, 0.0)  # of a recipe with a preset of another name


class Thresholds(BaseModel):
    """Bounds a compiled model must keep; missing one exits with 6.

    The floors catch a broken build. A release gate sets its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    psnr: float | None = Field(None, description="least mean PSNR of the images, dB; else the preset's floor")
    ssim: float = Field(0.0, description="least mean SSIM of the images")
    sqnr: float | None = Field(None, description="least mean SQNR of the noise prediction, dB; else the preset's floor")
    guidance: float | None = Field(
        None,
        description="least share of guidance (what the prompt changes) that is kept, mean over timesteps; 1 is all",
    )
    lpips: float | None = Field(None, description="largest mean ST-LPIPS of the images; needs the extra lpips")
    kernels: float = Field(
        25.0, description="SQNR of the integer kernels against the graph in floating point, median over timesteps, dB"
    )
    temporal_cosine: float | None = Field(
        None, description="lowest cosine of any temporal feature at any timestep; tables default to 0.999999"
    )
    agreement: float = Field(40.0, description="lowest SQNR of the graph against PyTorch fake-quant, in lock-step, dB")

    def psnr_of(self, preset: str) -> float:
        """The bound on the images' PSNR."""
        return FLOORS.get(preset, LOWEST).psnr if self.psnr is None else self.psnr

    def sqnr_of(self, preset: str) -> float:
        """The bound on the noise prediction's SQNR."""
        return FLOORS.get(preset, LOWEST).sqnr if self.sqnr is None else self.sqnr

    def temporal_cosine_of(self, source: str, stored: TableType = "fp32") -> float:
        """The bound for tables made from ``source``: those of full precision have no reason to differ.

        Args:
            stored: What their rows are stored in; int8 is a loss that was asked for.
        """
        if self.temporal_cosine is not None:
            return self.temporal_cosine
        if source != "table":
            return 0.0
        return 0.999 if stored == "int8" else 0.999999


class Method(BaseModel):
    """Which parts of the algorithms are in force; the defaults are all of both papers, joined, and error feedback.

    The ``[method]`` table of ``--config``. docs/algorithms.md says what each part does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tib: Literal["table", "quantized", "select"] = Field("table", description="what tables of temporal features hold")
    tiar: bool = Field(True, description="learn the temporal block's rounding jointly; off: like other layers")
    fsc: Literal["off", "tib", "all"] = Field("tib", description="activations with a quantization grid per timestep")
    timestep_weights: Literal["image", "uniform"] = Field(
        "image",
        description="calibration samples per timestep: by what its errors do to the image, or equally many",
    )
    estimator: Literal["mse", "minmax", "kl", "percentile"] = Field(
        "mse", description="how the observed range of an activation becomes a scale"
    )
    weight_range: Literal["search", "minmax"] = Field("search", description="how the scale of a weight is chosen")
    les: Literal["adaptive", "uniform", "linear", "quadratic", "analytic", "smoothquant", "off"] = Field(
        "uniform",
        description="equivalent scaling: how its loss weights the timesteps, where the effort says so; or analytic "
        "alone, SmoothQuant's closed form, or off",
    )
    pts: Literal["vote", "mse", "off"] = Field(
        "vote", description="power-of-two scaling: how its exponents are chosen, or off"
    )
    pts_layers: Literal["skip", "all"] = Field(
        "skip", description="layers with power-of-two scaling: readers of unnormalised features, or all"
    )
    pts_quorum: float = Field(0.85, ge=0, le=1, description="share of the votes an exponent needs (kappa)")
    pts_exponents: int = Field(
        4, ge=1, le=5, description="how many exponents are tried: 0, -1, ...; 5 needs 4-bit weights"
    )
    split_skips: bool = Field(True, description="quantize each half of a skip concatenation on its own")
    attention: Literal["auto", "float", "integer"] = Field(
        "auto",
        description="how attention's products q k^T and p v compute; auto: in integers where the target gains from it",
    )
    sharp_weights: bool = Field(
        True, description="8-bit weights for convolutions at the sample's own size, within 4 % of all weights"
    )
    error_feedback: bool = Field(True, description="round with GPTQ's error feedback; off: to the nearest integers")
    asymmetric_feedback: bool = Field(
        False,
        description="hold each layer to its result in the full-precision network, whose inputs do not err (GPTAQ); "
        "with error feedback",
    )
    cpus: Literal["any", "vnni"] = Field(
        "any",
        description="CPUs where integer kernels are exact: any, or with VNNI alone (larger weights, wrong elsewhere)",
    )
    reconstruct: bool = Field(True, description="learn the rounding block by block, where the effort says so")
    closed_loop: bool = Field(
        True,
        description="correct the prediction per timestep and channel, fitted on the quantized model's own trajectories "
        "and kept where held-out images gain",
    )
    learned_steps: bool = Field(
        True, description="tune activation scales on each block's output, where the effort says so"
    )


class LayerPins(BaseModel):
    """Widths of some layers, whatever the preset says; a ``[layers."PATTERN"]`` table of ``--config``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weights: Literal[4, 8, "float"] | None = Field(
        None, description="bits of the weights; float keeps the whole layer in floating point"
    )
    inputs: Literal[6, 8, 16, "float"] | None = Field(
        None,
        description="bits of the inputs, 16 on target qnn alone; float computes in floating point, from weights that "
        "are stored in bits",
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.weights == "float" and self.inputs not in (None, "float"):
            raise ValueError(
                f'weights = "float" keeps all of a layer in floating point; leave out inputs = {self.inputs}'
            )
        return self


class CompileConfig(BaseModel):
    """Everything the compiler can be asked for. Frozen; the defaults are those of the command line.

    In Python a wrong value is pydantic's ``ValidationError``, an unknown preset a ``ConfigError``; ``load_config``
    turns both into a ``ConfigError`` that names the nearest right one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: str = Field("w8a8", description="bits of weights and activations")
    auto: bool = Field(
        False,
        description="choose the bits of each layer from what they cost, for a PSNR, a size, a latency",
    )
    max_size: Megabytes | None = Field(
        None, gt=0, description="with --auto, the largest size of the graph, MB; or with a unit, such as 900kB"
    )
    max_latency: float | None = Field(
        None, gt=0, description="with --auto, the longest call with one sample on this machine, ms"
    )
    target: str = Field("ort-cpu", description="the engine that will run the bundle")
    effort: Literal["fast", "standard", "paper"] = Field(
        "standard", description="how long rounding is learned: not at all, some minutes, or as in the papers"
    )
    method: Method = Method.model_construct()
    layers: Mapping[str, LayerPins] = Field(
        {}, description="widths of layers by the pattern of their names; of two that match a layer, the later wins"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where quantization computes; auto: a GPU where there is one"
    )
    max_memory: ByteSize | None = Field(
        None,
        ge=1 << 20,
        description="ceiling on cached activations, such as 2GiB, else a sixth of the memory; the rest goes to disk",
    )
    calibration_images: int | None = Field(
        None, ge=1, le=MOST_IMAGES, description="images whose sampling is recorded for calibration; the effort decides"
    )
    validation_images: int | None = Field(
        None, ge=1, le=MOST_IMAGES, description="images to compare at the end; 16, or fewer where the budget says so"
    )
    budget: Duration = Field(
        timedelta(minutes=30), description="time that the comparison may take, such as 90s, 30min or 2h"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of noise and sampling")
    thresholds: Thresholds = Thresholds.model_construct()
    allow_precision_loss: bool = Field(False, description="keep a bundle whose layers do not all run in integers")
    pts_lowering: PtsLowering = Field("auto", description="form of power-of-two scaling in the graph; auto: per layer")
    tables: TableType = Field("fp32", description="number format of the rows of temporal tables: fp32, fp16 or int8")
    class_tables: bool = Field(
        False, description="make tables of what depends on class label and timestep only, where they are small"
    )
    prologue: bool = Field(False, description="write a second graph for what the prompt decides, run once per prompt")
    components: Components = Field(
        "link", description="how a pipeline's text encoder, VAE and other parts join the bundle"
    )
    decoder: bool = Field(
        True, description="write the decoder of a pipeline's VAE as ONNX, which makes pictures of latents without torch"
    )

    def model_post_init(self, context: Any, /) -> None:
        """Check the names that pydantic cannot know."""
        find_preset(self.preset)


TABLES: Mapping[str, type[BaseModel]] = {"thresholds": Thresholds, "method": Method}
"""Tables of a TOML file, and prefixes of flags."""

ONLY_OPTIONS = (
    "output",
    "steps",
    "scheduler",
    "conditioning",
    "guidance_scale",
    "factory",
    "recipe",
    "resume",
    "dump_dir",
    "triton",
)
"""Options of tfmq-export that say which model, how it is sampled and where to, and are no settings."""


def find_preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        ConfigError: there is none of that name; suggests the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]


def field_of_flag(name: str) -> str:
    """What a bound is called among the settings: a flag says which side of it is good."""
    return name.removeprefix("min_").removeprefix("max_") if name not in CompileConfig.model_fields else name


def load_config(path: Path | None, flags: Mapping[str, Any]) -> CompileConfig:
    """A TOML file under the flags that were given (None means not given).

    Raises:
        ConfigError: an unreadable file, an unknown key (suggests the nearest) or a value out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_toml(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not readable TOML: {error}") from error
    tables = {name: values.pop(name, {}) for name in TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name}: expected a table [{name}], got {table!r}")
    for key, value in flags.items():
        if value is not None:
            group, _, inner = key.partition(".")
            (tables[group] if inner else values)[inner or group] = value
    try:
        return CompileConfig(**values, **{name: model(**tables[name]) for name, model in TABLES.items()})
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def _explain(error: ValidationError, path: Path | None) -> str:
    first = error.errors()[0]
    table = next((name for name, model in TABLES.items() if model.__name__ == error.title), None)
    key = ".".join(str(part) for part in ([table] if table else []) + list(first["loc"]))
    where = f"{path}: " if path is not None else ""
    if table is None and first["loc"][:1] == ("layers",) and len(first["loc"]) > 1:
        return f"{where}{_explain_pin(first['loc'], first)}"
    if first["type"] == "extra_forbidden":
        if key in ONLY_OPTIONS:
            flag = key.replace("_", "-")
            return f"{where}unknown setting {key!r}; it belongs to one run: give it as --{flag}"
        inner = {f"{name}.{field}": field for name, model in TABLES.items() for field in model.model_fields}
        near = [name for name, field in inner.items() if field == field_of_flag(key)]  # as the flag is called
        near += difflib.get_close_matches(key, [*CompileConfig.model_fields, *inner], 1)
        return f"{where}unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{where}{key}: {first['msg']}, got {first['input']!r}"


def _explain_pin(place: Sequence[int | str], found: Mapping[str, object]) -> str:
    """What is wrong in a table of ``[layers]``."""
    _, pattern, *keys = place
    table = f'[layers."{pattern}"]'
    if found["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(keys[0]), LayerPins.model_fields, 1)
        known = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(LayerPins.model_fields)}"
        return f"{table}: unknown setting {str(keys[0])!r}; {known}"
    if found["type"] == "value_error":
        return f"{table}: {str(found['msg']).removeprefix('Value error, ')}"
    return f"{table}{f' {keys[0]}' if keys else ''}: {found['msg']}, got {found['input']!r}"
