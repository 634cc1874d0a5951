"""How much work quantization may cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.equivalent_scaling import ScalingSchedule

NARROW_BITS = 4


@dataclass(frozen=True, slots=True)
class RoundingSchedule:
    """How long to learn the rounding of one block; 0 iterations round to nearest.

    Attributes:
        iterations: For weights of up to 4 bits.
        iterations_8bit: For finer ones, whose rounding decides less; None is as many.
    """

    iterations: int
    batch: int
    learning_rate: float
    iterations_8bit: int | None = None

    def for_bits(self, bits: int) -> "RoundingSchedule":
        """The schedule of a block whose narrowest weights have so many bits."""
        if bits <= NARROW_BITS or self.iterations_8bit is None:
            return self
        return replace(self, iterations=self.iterations_8bit)


@dataclass(frozen=True, slots=True)
class Effort:
    """Iterations and samples of every learned part.

    Attributes:
        images: Trajectories to record, unless the user says.
        rows_per_timestep: Recorded samples of each timestep that calibrate and reconstruct.
        rounding: AdaRound, per block.
        scaling: LES, per value.
        step_iterations: Learned activation steps, per block.
        temporal: TIAR.
    """

    name: str
    images: int
    rows_per_timestep: int
    scaling: ScalingSchedule
    rounding: RoundingSchedule
    step_iterations: int
    temporal: RoundingSchedule


EFFORTS: Mapping[str, Effort] = {
    "fast": Effort(
        "fast",
        images=8,
        rows_per_timestep=4,
        scaling=ScalingSchedule(60, 8, 1e-2, patience=20),
        rounding=RoundingSchedule(0, 8, 5e-2),
        step_iterations=0,
        temporal=RoundingSchedule(0, 0, 1e-2),
    ),
    "standard": Effort(
        "standard",
        images=32,
        rows_per_timestep=16,
        scaling=ScalingSchedule(60, 8, 1e-2, patience=20),
        rounding=RoundingSchedule(600, 8, 3e-2, iterations_8bit=200),
        step_iterations=100,
        temporal=RoundingSchedule(1500, 0, 1e-2),
    ),
    "paper": Effort(
        "paper",
        images=102,
        rows_per_timestep=102,  # 5,100 samples at 50 steps; DMQ takes 5,120
        scaling=ScalingSchedule(6000, 32, 1e-3),
        rounding=RoundingSchedule(20000, 32, 1e-3),
        step_iterations=5000,
        temporal=RoundingSchedule(20000, 0, 1e-3),
    ),
}


def find_effort(name: str) -> Effort:
    """Look an effort up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in EFFORTS:
        raise ConfigError(f"unknown effort {name!r}; there is {', '.join(EFFORTS)}")
    return EFFORTS[name]
