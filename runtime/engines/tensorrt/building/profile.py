"""The shapes an engine is built for.

An engine takes what its profiles cover and nothing else, and is tuned for the usual shape of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tfmq_export.bundle.manifest import InputInfo, Manifest
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange

Sizes = tuple[int, int, int]
"""Smallest, usual and largest."""
LENGTHS: Sizes = (1, 77, 512)
"""Tokens of a prompt whose length may vary: one CLIP text is usual, and most encoders stop at 512."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One set of shapes that kernels are chosen for.

    Attributes:
        batch: Smallest, usual and largest batch, for every input that ``shapes`` does not name.
        shapes: By input name; needed where more than the batch may vary.
    """

    batch: Sizes = (1, 2, 8)
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ShapeRange(*((size,) for size in self.batch))


def step_profiles(
    manifest: Manifest, batches: Sequence[Sizes] = ((1, 2, 8),), lengths: Sizes = LENGTHS
) -> tuple[Profile, ...]:
    """Profiles for the graph of one step: the manifest fixes every size but the batch and the lengths of prompts.

    The tables that a prologue passes vary on their second axis. It reads nothing of a length that may vary itself.
    """
    prologue = manifest.prologue
    tables = [x for x in prologue.tensors if x.per_timestep] if prologue is not None else []
    steps = len(manifest.timesteps)
    return tuple(
        Profile(
            batch,
            {x.name: ShapeRange(*((steps, size, *x.shape) for size in batch)) for x in tables}
            | _prompts([x for x in manifest.inputs if prologue is None or x.name in prologue.direct], batch, lengths),
        )
        for batch in batches
    )


def _prompts(inputs: Sequence[InputInfo], batch: Sizes, lengths: Sizes) -> dict[str, ShapeRange]:
    """The inputs of which more than the batch may vary."""
    return {
        x.name: ShapeRange(
            *(
                (size, *(length if axis is None else axis for axis in x.shape))
                for size, length in zip(batch, lengths, strict=True)
            )
        )
        for x in inputs
        if None in x.shape
    }


def parse_sizes(text: str, what: str) -> Sizes:
    """``1,2,8`` (smallest, usual, largest), or one number for a size that never varies.

    Args:
        what: Has these sizes, for the error: "batch".
    Raises:
        ConfigError: neither, or not growing.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ConfigError(f"{what} {text!r}: give smallest, usual and largest such as 1,2,8, or one number")
    return Profile((sizes[0], sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])).batch
