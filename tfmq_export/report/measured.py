"""``OUT/tfmq/report.json``, read back as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import LoadError, first_line
from tfmq_export.recipe.plain import read_json
from tfmq_export.report.speed import Speed, speed_in_proof


@dataclass(frozen=True, slots=True)
class Check:
    """A figure against what was demanded of it."""

    metric: str
    value: float
    direction: str
    threshold: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Realized:
    """What one layer became.

    Attributes:
        asked: Such as "W8A8".
        kernels: Operations that compute it, in the engine's own words.
        emulated: Widths below 8 bits that 8-bit kernels carry; empty where there are none.
        lost: Why it is not what was asked; empty where it is.
    """

    asked: str
    kernels: tuple[str, ...]
    emulated: str
    lost: str


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """A temporal feature as it is served.

    Attributes:
        cosine: With full precision, [T].
        mismatch: Steps of the schedule to the timestep it really looks like, [T].
    """

    path: str
    cosine: NDArray[np.float64]
    mismatch: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """How much of what the prompt changes is kept, at each timestep where the sampler guides.

    Attributes:
        timesteps: In the order of sampling, [G].
        kept: 1 is all, [G].
        snr: Signal to noise of the same, dB, [G].
    """

    timesteps: NDArray[np.float64]
    kept: NDArray[np.float64]
    snr: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the compiler; memory is the most the process held up to its end, None where nobody could tell."""

    title: str
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Everything that was found when the bundle was made.

    Attributes:
        values: Every comparison, by its metric.
        integer_share: Share of the multiply-accumulates that run in integers.
        realized: What each layer became, by its name.
        strays: Operations of no layer that compute on dequantized numbers, with the reason.
        guidance: None where the sampler does not guide.
        notes: What looks wrong about the float model.
        host: Processor and instruction sets of the machine that measured.
        command: That makes the bundle again; empty where no command made it.
        speed: Of a few calls against PyTorch; None where it was not timed.
    """

    checks: tuple[Check, ...]
    values: Mapping[str, tuple[float, ...]]
    integer_share: float
    realized: Mapping[str, Realized]
    strays: tuple[tuple[str, str], ...]
    features: tuple[Feature, ...]
    guidance: Guidance | None
    notes: tuple[str, ...]
    host: Mapping[str, str]
    stages: tuple[Stage, ...]
    command: str
    speed: Speed | None = None

    @property
    def passed(self) -> bool:
        """Whether every figure is what was demanded, and every layer what was asked."""
        return all(check.passed for check in self.checks) and not self.lost

    @property
    def lost(self) -> int:
        """Layers and operations that are not what was asked."""
        return sum(bool(each.lost) for each in self.realized.values()) + len(self.strays)

    def mean(self, metric: str) -> float | None:
        """None where it was not measured."""
        found = self.values.get(metric)
        return None if not found else float(np.mean(found))

    @classmethod
    def read(cls, bundle: Bundle) -> Self:
        """Of a bundle.

        Raises:
            LoadError: there is no report, or none that can be read.
        """
        path = bundle.report
        try:
            return cls._of(read_json(path))
        except FileNotFoundError:
            raise LoadError(f"{path}: the bundle has no report; compile the model again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            raise LoadError(f"{path}: not a readable report ({said}); compile the model again") from error

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Self:
        precision = found["precision"]
        return cls(
            checks=tuple(
                Check(x["metric"], float(x["value"]), x["direction"], float(x["threshold"]), _truth(x["passed"]))
                for x in found["verdicts"]
            ),
            values={x["metric"]: tuple(float(value) for value in x["values"]) for x in found["comparisons"]},
            integer_share=float(precision["integer_share"]),
            realized={
                x["name"]: Realized(x["asked"], tuple(x["realized"]), x["emulated"], x["lost"])
                for x in precision["layers"]
            },
            strays=tuple((x["name"], x["lost"]) for x in precision["strays"]),
            features=tuple(
                Feature(path, np.array(x["cosine"], np.float64), np.array(x["mismatch"], np.int64))
                for path, x in found["temporal"].items()
            ),
            guidance=_guidance(found.get("guidance")),
            notes=tuple(found["notes"]),
            host=found["host"],
            stages=tuple(Stage(**x) for x in found.get("stages", ())),
            command=found.get("command", ""),
            speed=None if found.get("speed") is None else speed_in_proof(found["speed"], found["host"]["processor"]),
        )


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false, not {str(value)[:20]!r}")
    return value


def _guidance(found: Mapping[str, Any] | None) -> Guidance | None:
    if found is None:
        return None
    timesteps, kept, snr = (np.array([float(x) for x in found[name]]) for name in ("timesteps", "kept", "snr_db"))
    return Guidance(timesteps, kept, snr)
