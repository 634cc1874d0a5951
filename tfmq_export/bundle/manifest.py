"""The output folder: where its files lie and what its manifest says.

    OUT/<component>/model.onnx     the denoiser (unet, transformer, or denoiser for a factory)
    OUT/<component>/config.json    the model's own configuration
    OUT/<component>_prologue/      model.onnx: what the prompt decides, run once (``--prologue``)
    OUT/<component>*/engines/      engines or context binaries built from the graph beside them (``tfmq-build``)
    OUT/scheduler/                 the scheduler the schedule came from, where there is one
    OUT/tfmq/                      recipe, manifest, report and conditioning examples

A bundle is read with the standard library and numpy alone, so that a production host needs
nothing else beside its engine.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.call import CallInfo
from tfmq_export.bundle.decoder import DecoderInfo
from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import ConfigError, LoadError, first_line
from tfmq_export.recipe.plain import build, read_json
from tfmq_export.recipe.recipe import TableType
from tfmq_export.recipe.timesteps import TimestepSet

SCHEMA = 1
NUMBERS = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""Element types of a graph's inputs, as numpy calls them."""
LARGEST = 1 << 31
"""Elements of one row of an input: ONNX's files hold no more than 2 GiB."""


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One graph input.

    Attributes:
        role: "sample", "timestep" or "conditioning".
        dtype: numpy name of the element type.
        shape: Without the batch axis; None for a size that may vary.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype not in NUMBERS:
            raise ConfigError(f"input {self.name!r}: no element type {self.dtype!r}; there is {', '.join(NUMBERS)}")
        if (
            any(size is not None and size < 1 for size in self.shape)
            or math.prod(size or 1 for size in self.shape) > LARGEST
        ):
            raise ConfigError(f"input {self.name!r}: no row has the shape {list(self.shape)}")


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """How images are drawn from the denoiser.

    Attributes:
        kind: A diffusers scheduler class such as "DDIMScheduler", or "function" for the user's own.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 means a single conditional pass.
    """

    kind: str
    steps: int
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not math.isfinite(self.guidance_scale):
            raise ConfigError(f"{self.kind}: cannot walk {self.steps} steps with guidance {self.guidance_scale}")


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer and the precision asked for; widths of 0 mean floating point.

    Attributes:
        weight_bits: What weights are stored in; a layer may compute in floating point all the same.
        reason: Why it computes in floating point, where it does.
        chosen: Why it has its bits, where the preset did not say.
    """

    name: str
    path: str
    kind: str
    macs: int
    weight_bits: int
    activation_bits: int
    reason: str = ""
    chosen: str = ""


@dataclass(frozen=True, slots=True)
class PassInfo:
    """What one graph pass did: how many sites it changed, which it left alone and why, and what it chose where."""

    name: str
    semantics: str
    changed: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PassedTensor:
    """What the prologue returns and the denoiser takes.

    Attributes:
        dtype: numpy name of the element type.
        shape: Without the batch axis, and without the timestep axis of a table.
        per_timestep: Whether it is a table over the schedule, [T, N, ...]; else it is [N, ...].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    per_timestep: bool


@dataclass(frozen=True, slots=True)
class PrologueInfo:
    """The graph that runs once per prompt.

    Attributes:
        reads: Conditioning inputs the prologue takes.
        direct: Conditioning inputs the denoiser still takes itself.
        tensors: What the denoiser takes in place of the rest.
        layers: Names of the layers that moved.
        macs: Multiply-accumulates of those layers for one sample: saved at every step but the prologue's.
        share: Of the whole model's.
        bit_equal: Whether both forms gave the same bits on the example prompts when the bundle was made.
        kept: Products of the prompt that stay in the denoiser, with the reasons.
    """

    reads: tuple[str, ...]
    direct: tuple[str, ...]
    tensors: tuple[PassedTensor, ...]
    layers: tuple[str, ...]
    macs: int
    share: float
    bit_equal: bool
    kept: tuple[tuple[str, str], ...] = ()

    def bytes_per_sample(self, steps: int) -> int:
        """Memory that a prepared prompt takes.

        Args:
            steps: Timesteps of the schedule.
        """
        return sum(
            math.prod(x.shape) * np.dtype(x.dtype).itemsize * (steps if x.per_timestep else 1) for x in self.tensors
        )


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was built from a graph and where it runs: a TensorRT engine, or a context binary for Hexagon.

    Attributes:
        file: Relative path; its receipt lies beside it, see ``receipt``.
        graph: Relative path of the graph it was built from.
        flavour: "tensorrt", "tensorrt-rtx" or "qnn".
        version: Of the library that built it, which is the one that can open it.
        compute_capabilities: GPUs it runs on, such as 89.
        size: Bytes.
        profiles: Smallest, usual and largest shape of each input that may vary, once per profile.
        chip: The Snapdragon chip of a context binary, such as "sm8550"; empty for engines of GPUs.
    """

    file: str
    graph: str
    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    size: int
    profiles: tuple[Mapping[str, tuple[Shape, Shape, Shape]], ...]
    chip: str = ""

    @property
    def receipt(self) -> str:
        """Relative path of what the build said: layers and their types, warnings, seconds."""
        return f"{self.file}.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime or an auditor needs to know about a bundle.

    Attributes:
        component: Folder of the graph.
        source: File or folder name the model came from.
        macs: Multiply-accumulates of the whole model for one sample.
        weight_bytes: Of the full-precision weights.
        integer_share: Share of ``macs`` asked to run in integers.
        conditioning: Names of the arrays in ``tfmq/conditioning.npz``.
        files: SHA-256 of each file of the bundle, by relative path.
        prologue: Of a bundle in two graphs; None where one graph does it all.
        tables: What rows of temporal tables are stored in: "fp32", "fp16" or "int8".
        engines: Built from the bundle's graphs.
        parts: Output channels of each node that a layer became, for layers computed in parts, by the layer's name.
        call: Where the model was recorded in its pipeline, how it is called there.
        decoder: What makes pictures of its latents, where the bundle brings it.
    """

    version: str
    component: str
    source: str
    fingerprint: str
    preset: str
    target: str
    inputs: tuple[InputInfo, ...]
    output: str
    timesteps: TimestepSet
    sampler: SamplerInfo
    macs: int
    weight_bytes: int
    integer_share: float
    layers: tuple[LayerInfo, ...]
    passes: tuple[PassInfo, ...]
    versions: Mapping[str, str]
    provenance: Mapping[str, str]
    files: Mapping[str, str]
    prologue: PrologueInfo | None = None
    tables: TableType = "fp32"
    engines: tuple[EngineInfo, ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    call: CallInfo | None = None
    decoder: DecoderInfo | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for role in ("sample", "timestep"):
            if len(self.input(role)) != 1:
                raise ConfigError(f"needs one {role} input, has {len(self.input(role))}")
        for name in (f"{self.component}/", *self.files, *(engine.file for engine in self.engines)):
            if "\0" in name or name.startswith("/") or {"", ".", ".."} & {*name.rstrip("/").split("/")}:
                raise ConfigError(f"{name[:80]!r} is no place inside a bundle")

    def __repr__(self) -> str:
        return f"Manifest({self.source}: {self.preset} for {self.target}, {len(self.layers)} layers)"

    @property
    def correction(self) -> str | None:
        """What became of the correction of the prediction, in words; None where none was asked for."""
        said = self.provenance.get("correction")
        if said is None or said.startswith("none") or any(done.name == "CorrectPrediction" for done in self.passes):
            return said
        return f"none: fitted with the output grids of another target than {self.target}"

    def input(self, role: str) -> tuple[InputInfo, ...]:
        """The inputs that play a role, in graph order."""
        return tuple(info for info in self.inputs if info.role == role)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder written by ``tfmq-export``."""

    root: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.root)!r}, {self.manifest.preset} for {self.manifest.target})"

    @property
    def model(self) -> Path:
        return self.root / self.manifest.component / "model.onnx"

    @property
    def graph_hash(self) -> str:
        """SHA-256 of the denoiser's graph; the same bundle has it wherever it lies."""
        return self.manifest.files[f"{self.manifest.component}/model.onnx"]

    @property
    def prologue(self) -> Path | None:
        """The graph that runs once per prompt, where the bundle has one."""
        if self.manifest.prologue is None:
            return None
        return self.root / prologue_folder(self.manifest.component) / "model.onnx"

    @property
    def graphs(self) -> tuple[Path, ...]:
        """The denoiser, and behind it the prologue where the bundle has one."""
        return (self.model,) if self.prologue is None else (self.model, self.prologue)

    @property
    def scheduler(self) -> Path:
        return self.root / "scheduler" / "scheduler_config.json"

    @property
    def report(self) -> Path:
        return self.root / "tfmq" / "report.json"

    def conditioning(self) -> dict[str, NDArray[np.generic]]:
        """Example conditioning, [prompts, ...] under each input's name; ``<name>.unconditional`` beside it."""
        path = self.root / "tfmq" / "conditioning.npz"
        return read_arrays(path) if path.exists() else {}

    def described(self) -> dict[str, str]:
        """What it is, in words, by heading."""
        manifest = self.manifest
        inputs = [f"{x.name} {list(x.shape)} {x.dtype}" for x in manifest.inputs]
        return {
            "folder": str(self.root),
            "model": manifest.source,
            "compiled": f"{manifest.preset} for {manifest.target}",
            "in integers": f"{manifest.integer_share:.1%} of the multiply-accumulates",
            "inputs": ", ".join(inputs),
            "timesteps": manifest.timesteps.describe(),
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return table_html(self.described())

    def verify(self, *, served: bool = False) -> None:
        """Check files against the manifest's hashes.

        Args:
            served: Only those that serving reads: graphs, their weights and engines. Not the recipe, and not a
                pipeline's other components, which may be gigabytes.
        Raises:
            LoadError: names the first file that is missing or altered.
        """
        folders = (self.manifest.component, prologue_folder(self.manifest.component))
        for name in self.manifest.files:
            if not served or name.partition("/")[0] in folders:
                self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Check one file against its hash.

        Args:
            name: Relative path, listed in the manifest.
        Raises:
            LoadError: it is missing or altered.
        """
        path, again = self.root / name, "build it" if name.endswith(".engine") else "compile it"
        if not path.is_file():
            raise LoadError(f"{path}: missing from the bundle; {again} again")
        if sha256(path) != self.manifest.files[name]:
            raise LoadError(f"{path}: differs from the manifest's hash (truncated or altered); {again} again")

    def extended(self, files: Iterable[str], engines: Iterable[EngineInfo] = ()) -> "Bundle":
        """The bundle with these files, which are in the folder already, in its manifest; engines of the same name go.

        Args:
            files: Relative paths, those of the engines included.
        """
        hashes = {name: sha256(self.root / name) for name in files}
        added = tuple(engines)
        kept = tuple(x for x in self.manifest.engines if x.file not in {each.file for each in added})
        manifest = replace(self.manifest, files={**self.manifest.files, **hashes}, engines=(*kept, *added))
        write_manifest(self.root, manifest)
        return Bundle(self.root, manifest)


def table_html(rows: Mapping[str, str]) -> str:
    """Headings and texts as a table for notebooks."""
    cells = [f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items()]
    return f"<table>{''.join(cells)}</table>"


def prologue_folder(component: str) -> str:
    """Folder of a component's prologue."""
    return f"{component}_prologue"


def sha256(path: Path) -> str:
    """Hash of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_bundle(root: str | Path) -> Bundle:
    """Read a bundle's manifest. No engine is opened and no hash compared: ``Bundle.verify`` does that.

    Args:
        root: A folder written by ``tfmq-export``.
    Raises:
        LoadError: the folder is no bundle, or its manifest cannot be read.
    """
    root = Path(root)
    path = root / "tfmq" / "manifest.json"
    if not path.is_file():
        raise LoadError(f"{root}: not a bundle (no tfmq/manifest.json); make one with `tfmq-export MODEL -o {root}`")
    try:
        data = read_json(path)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {str(data.get('schema'))[:20]}, this version reads {SCHEMA}")
        return Bundle(root, build(Manifest, data))
    except (OSError, ConfigError, ValueError) as error:
        raise LoadError(f"{path}: not a readable manifest ({first_line(error)}); compile the model again") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``OUT/tfmq/manifest.json``."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
    with replaced_file(root / "tfmq" / "manifest.json") as partial:  # a bundle that is served may be extended
        partial.write_text(text + "\n", "utf-8")
