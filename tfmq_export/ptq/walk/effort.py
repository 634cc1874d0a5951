"""How much work quantization may cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfmq_export.errors import ConfigError
from tfmq_export.ptq.equivalent_scaling import ScalingSchedule


@dataclass(frozen=True, slots=True)
class RoundingSchedule:
    """How long to learn the rounding of one block; 0 iterations leave the codes it would start from."""

    iterations: int
    batch: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Effort:
    """Iterations and samples of every learned part.

    Attributes:
        images: Trajectories to record, unless the user says.
        rows_per_timestep: Recorded samples of each timestep that calibrate and reconstruct.
        rounding: AdaRound, per block.
        scaling: LES, per value, from the analytic form on.
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
        scaling=ScalingSchedule(0, 12, 2e-2),
        rounding=RoundingSchedule(0, 8, 5e-2),
        step_iterations=0,
        temporal=RoundingSchedule(0, 0, 1e-2),
    ),
    "standard": Effort(
        "standard",
        images=16,
        rows_per_timestep=8,
        scaling=ScalingSchedule(60, 12, 1e-2, patience=20),
        rounding=RoundingSchedule(0, 8, 5e-2),
        step_iterations=0,
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


NARROW_BITS = 4
NARROW: Mapping[str, Effort] = {
    "fast": replace(EFFORTS["fast"], scaling=ScalingSchedule(20, 12, 2e-2)),
    "standard": replace(
        EFFORTS["standard"],
        images=32,
        rows_per_timestep=16,
        rounding=RoundingSchedule(600, 8, 2e-2),
        step_iterations=100,
    ),
}
"""For weights of up to ``NARROW_BITS``: scaling and rounding decide more; at 8 bits learning them gains little."""


def find_effort(name: str, weight_bits: int) -> Effort:
    """Look an effort up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in EFFORTS:
        raise ConfigError(f"unknown effort {name!r}; there is {', '.join(EFFORTS)}")
    return NARROW.get(name, EFFORTS[name]) if 0 < weight_bits <= NARROW_BITS else EFFORTS[name]
