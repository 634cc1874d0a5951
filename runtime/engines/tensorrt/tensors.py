"""What an engine takes and gives, and which of its profiles a run belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.tensorrt.building.profile import ShapeRange

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EngineTensors:
    """What an engine takes and gives.

    Attributes:
        inputs: Types by name, in order.
        outputs: The same.
        profiles: Shapes of every input, once per profile.
    """

    inputs: Mapping[str, np.dtype[Any]]
    outputs: Mapping[str, np.dtype[Any]]
    profiles: tuple[Mapping[str, ShapeRange], ...]

    def profile_of(self, shapes: Shapes) -> int:
        """The profile tuned nearest to these shapes, among those that cover them.

        Raises:
            ConfigError: names an input that no profile covers.
        """
        fitting = [
            (_distance(shapes, profile), index)
            for index, profile in enumerate(self.profiles)
            if all(profile[name].covers(shape) for name, shape in shapes.items())
        ]
        if fitting:
            return min(fitting)[1]
        told = [
            f"{name} {list(shape)}, built for {' and '.join(_told(each[name]) for each in self.profiles)}"
            for name, shape in shapes.items()
            if not any(each[name].covers(shape) for each in self.profiles)
        ] or ["these shapes together are in no profile"]
        raise ConfigError(f"{'; '.join(told)}; split the batch, or build an engine for it (tfmq-build --batch)")


def _distance(shapes: Shapes, profile: Mapping[str, ShapeRange]) -> float:
    """How far shapes are from what a profile is tuned for: factors between the sizes, as logarithms."""
    pairs = [
        (size, usual) for name, shape in shapes.items() for size, usual in zip(shape, profile[name].usual, strict=True)
    ]
    return sum(abs(float(np.log(size / usual))) for size, usual in pairs)


def _told(shapes: ShapeRange) -> str:
    if shapes.smallest == shapes.largest:
        return str(list(shapes.usual))
    return f"{list(shapes.smallest)} to {list(shapes.largest)}"
