"""What an engine takes and gives, and which of its profiles a run belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmq_export.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes an input may take: the engine accepts all between the ends and is tuned for the usual one."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.smallest) == len(self.usual) == len(self.largest):
            raise ConfigError(f"the shapes of a profile differ in rank: {self.smallest} {self.usual} {self.largest}")
        for sizes in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise ConfigError(f"a profile's sizes must grow from smallest to largest, got {sizes}")

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape lies between the ends."""
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )


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
        fits = any(
            all(profile[name].covers((profile[name].usual[0], *shape[1:])) for name, shape in shapes.items() if shape)
            for profile in self.profiles
        )
        remedy = (
            "split the batch, or build an engine for it (tfmq-build --batch)"
            if fits
            else "build an engine for prompts of that length (tfmq-build --tokens)"
        )
        raise ConfigError(f"{'; '.join(told)}; {remedy}")


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
