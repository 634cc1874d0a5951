"""Golden files: what an accepted bundle answers, small enough for a repository.

A golden holds a sketch of the prediction at every timestep and of each image, some dozen KB of JSON. Written from a
bundle of preset ``fp32`` it stands for the float model: later bundles are then compared with full precision where there
is no torch.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfmq_export import __version__
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import AccuracyError, ConfigError, LoadError, first_line
from tfmq_export.gate.probe import images, predictions, probe_of
from tfmq_export.gate.sketch import Sketch
from tfmq_export.limits import LARGEST_SEED, MOST_SAMPLES
from tfmq_export.recipe.plain import build, read_json
from tfmq_export.recipe.timesteps import TimestepSet
from tfmq_export.runtime.loaded import load

SCHEMA = 1
PLAIN = {"origin": str, "source": str, "fingerprint": str, "seed": int, "samples": int, "conditioning": str}
"""Fields of a golden file that are as they are in JSON."""


@dataclass(frozen=True, slots=True)
class Golden:
    """What one bundle answered.

    Attributes:
        origin: Version of tfmq-export, engine, preset and target it was written with.
        source: Model the bundle came from.
        fingerprint: Of that model.
        seed: Of the questions; ``samples`` is their batch size.
        conditioning: Hash of the conditioning they were asked with.
        inputs: All samples the denoiser saw.
        predictions: One for each timestep.
        images: One for each image; none where the bundle's sampler is not DDIM.
        peak: Span of the images' values.
    """

    origin: str
    source: str
    fingerprint: str
    timesteps: TimestepSet
    seed: int
    samples: int
    conditioning: str
    inputs: Sketch
    predictions: tuple[Sketch, ...]
    images: tuple[Sketch, ...]
    peak: float

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"a seed of {self.seed}; give one from 0 to {LARGEST_SEED}")
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ConfigError(f"{self.samples} samples per timestep; give 1 to {MOST_SAMPLES}")


def make_golden(bundle: Bundle, *, samples: int = 2, seed: int = 0) -> Golden:
    """Ask a bundle, and keep what it answers.

    Raises:
        LoadError: the bundle is altered.
        AccuracyError: it answers with NaN or infinity, which nothing should be compared with.
    """
    bundle.verify()
    manifest, probe = bundle.manifest, probe_of(bundle, samples, seed)
    with load(bundle.root) as loaded:
        answers = predictions(loaded, probe)
        drawn, engine = images(loaded, probe), loaded.engine
    for timestep, answer in zip(manifest.timesteps.values, answers, strict=True):
        if not np.isfinite(answer).all():
            raise AccuracyError(f"{bundle.root}: predicts NaN or infinity at timestep {timestep:g}; compile it again")
    picture = drawn is None or (drawn.min() >= 0 and drawn.max() <= 1)
    return Golden(
        origin=f"tfmq-export {__version__}, {engine}, {manifest.preset} for {manifest.target}",
        source=manifest.source,
        fingerprint=manifest.fingerprint,
        timesteps=manifest.timesteps,
        seed=seed,
        samples=samples,
        conditioning=probe.digest,
        inputs=Sketch.of(np.concatenate([probe.sample(step) for step in range(len(answers))])),
        predictions=tuple(map(Sketch.of, answers)),
        images=() if drawn is None else tuple(map(Sketch.of, drawn)),
        peak=1.0 if drawn is None or picture else float(np.ptp(drawn)),
    )


def write_golden(golden: Golden, path: Path) -> None:
    """Write it as JSON; a file that is there is replaced in one step."""
    data = {
        "schema": SCHEMA,
        "origin": golden.origin,
        "source": golden.source,
        "fingerprint": golden.fingerprint,
        "seed": golden.seed,
        "samples": golden.samples,
        "conditioning": golden.conditioning,
        "peak": golden.peak,
        "real": golden.timesteps.real,
        "inputs": golden.inputs.to_json(),
        "predictions": [
            {"timestep": timestep, **sketch.to_json()}
            for timestep, sketch in zip(golden.timesteps.values, golden.predictions, strict=True)
        ],
        "images": [sketch.to_json() for sketch in golden.images],
    }
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_golden(path: Path) -> Golden:
    """Read it back.

    Raises:
        LoadError: there is no such file, or it is no golden of this version.
    """
    try:
        data = read_json(path)
        if data["schema"] != SCHEMA:
            raise LoadError(f"{path}: schema {data['schema']}, this version reads {SCHEMA}; write it with tfmq-golden")
        golden = Golden(
            **{name: build(kind, data[name], name) for name, kind in PLAIN.items()},
            timesteps=TimestepSet(tuple(item["timestep"] for item in data["predictions"]), data["real"]),
            inputs=Sketch.from_json(data["inputs"]),
            predictions=tuple(map(Sketch.from_json, data["predictions"])),
            images=tuple(map(Sketch.from_json, data["images"])),
            peak=build(float, data["peak"], "peak"),
        )
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}; write it with `tfmq-golden OUT -o {path}`") from error
    except (ConfigError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{path}: not a readable golden file ({first_line(error)}); write it again with tfmq-golden"
        ) from error
    if not math.isfinite(golden.peak) or golden.peak <= 0:
        raise LoadError(f"{path}: images of span {golden.peak}; write it again with tfmq-golden")
    return golden
