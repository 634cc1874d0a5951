"""The shapes an engine is built for.

An engine takes what its profiles cover and nothing else, and is tuned for the usual shape of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tfmq_export.bundle.manifest import Manifest
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange


@dataclass(frozen=True, slots=True)
class Profile:
    """One set of shapes that kernels are chosen for.

    Attributes:
        batch: Smallest, usual and largest batch, for every input that ``shapes`` does not name.
        shapes: By input name; needed where more than the batch may vary.
    """

    batch: tuple[int, int, int] = (1, 2, 8)
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ShapeRange(*((size,) for size in self.batch))


def step_profiles(manifest: Manifest, batches: Sequence[tuple[int, int, int]] = ((1, 2, 8),)) -> tuple[Profile, ...]:
    """Profiles for the graph of one step: the manifest fixes every size but the batch.

    The tables that a prologue passes vary on their second axis.
    """
    tables = [x for x in manifest.prologue.tensors if x.per_timestep] if manifest.prologue is not None else []
    steps = len(manifest.timesteps)
    return tuple(
        Profile(batch, {x.name: ShapeRange(*((steps, size, *x.shape) for size in batch)) for x in tables})
        for batch in batches
    )


def parse_batch(text: str) -> tuple[int, int, int]:
    """``1,2,8`` (smallest, usual, largest), or one number for a batch that never varies.

    Raises:
        ConfigError: neither, or not growing.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ConfigError(f"batch {text!r}: give smallest, usual and largest such as 1,2,8, or one number")
    batch = (sizes[0], sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])
    return Profile(batch).batch
