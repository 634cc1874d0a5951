"""The bits of each layer: the preset's, unless a pin of the user names it."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.config import LayerPins
from tfmq_export.errors import ConfigError
from tfmq_export.recipe.recipe import SkipSplit

FLOAT = 0
"""Bits of what stays in floating point."""


@dataclass(frozen=True, slots=True)
class Widths:
    """What one layer takes in place of the preset's bits.

    Attributes:
        weights: Bits; ``FLOAT`` keeps the layer in floating point; None leaves them to the preset.
        inputs: Bits; ``FLOAT`` computes in floating point from stored weights; None leaves them to the preset.
        why: Who said so, for people.
        in_float: Why the layer computes in floating point, where it does; the same for all layers of one reason.
    """

    weights: int | None
    inputs: int | None
    why: str
    in_float: str = ""

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weights == FLOAT


def layer_names(program: DiffusionProgram, splits: Sequence[SkipSplit]) -> dict[str, str]:
    """What people call each layer that can be quantized, by the value it computes: its module path.

    Args:
        splits: Layers on skip concatenations; the halves of one are called ``path[0]``, ``path[1]``, ...
    """
    halves = {split.name: split for split in splits}
    found: dict[str, str] = {}
    for op in program.operations:
        if op.name in halves:
            split = halves[op.name]
            found |= {split.part(index): f"{op.path}[{index}]" for index in range(len(split.sizes))}
        else:
            found[op.name] = op.path
    return found


def pinned(names: Mapping[str, str], pins: Mapping[str, LayerPins]) -> dict[str, Widths]:
    """The layers that the user pinned, by the value they compute.

    Of several patterns that match a layer the last one wins, setting by setting. ``*`` and ``?`` are wild; a pattern
    without ``[0]`` at its end matches both halves of a layer.

    Args:
        names: From ``layer_names``.
        pins: By pattern, in the order of the file.
    Raises:
        ConfigError: a pattern matches no layer; names near ones.
    """
    found: dict[str, Widths] = {}
    for pattern, pin in pins.items():
        matched = [value for value, path in names.items() if _matches(path, pattern)]
        if not matched:
            raise ConfigError(f'[layers."{pattern}"] matches no layer; {_near(pattern, names.values())}')
        for value in matched:
            before = found.get(value)
            weights = pin.weights if pin.weights is not None else before.weights if before else None
            inputs = pin.inputs if pin.inputs is not None else before.inputs if before else None
            found[value] = Widths(_bits(weights), _bits(inputs), f"pinned by {pattern}", f"pinned by {pattern}")
    return found


def _bits(asked: int | str | None) -> int | None:
    return FLOAT if asked == "float" else None if asked is None else int(asked)


def _matches(path: str, pattern: str) -> bool:
    literal = pattern.replace("[", "[[]")  # a half's [0] is no set of characters
    return fnmatchcase(path, literal) or fnmatchcase(path.partition("[")[0], literal)


def _near(pattern: str, paths: Iterable[str]) -> str:
    """What could have been meant: whole names, else names that hold its longest word."""
    paths = list(dict.fromkeys(path.partition("[")[0] for path in paths))
    near = difflib.get_close_matches(pattern, paths, 3, cutoff=0.5)
    if not near:
        words = sorted({word for path in paths for word in path.split(".")})
        meant = [
            match for part in pattern.split(".") for match in difflib.get_close_matches(part.strip("*?"), words, 1)
        ]
        near = [path for path in paths if any(word in path.split(".") for word in meant)][:3]
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there is {', '.join(paths[:3])}, ..."
