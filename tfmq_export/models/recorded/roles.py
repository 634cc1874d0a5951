"""Which argument is what: told by how the values behave from call to call, names only where that leaves a choice.

The same in every call of every run is a constant. One number that changes along a run is the timestep. Of what takes
most values along a run the first is the sample. All else is conditioning: it belongs to the prompt, to guidance, or
is computed outside at every step.
"""

import builtins
import inspect
import keyword
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves

from tfmq_export.bundle.call import LeafPath
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.recorded.calls import CallPlan, Leaf, same
from tfmq_export.models.recorded.lengths import Cut

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "noise_labels", "c_noise")
"""What models call it; asked only where several arguments behave alike, or a run is a single call."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A sampler, ``draw(seed) -> image``, that says what is what among the arguments of its model.

    Attributes:
        draw: With the module inside.
        sample: The noisy sample, by the name of the argument, or as ``extra['x']`` where it is inside one.
        timestep: Likewise. None leaves it to how the values behave from call to call.
    """

    draw: Callable[[int], Any]
    sample: str | None = None
    timestep: str | None = None

    def __call__(self, seed: int) -> Any:
        return self.draw(seed)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRun:
    """The calls of one run.

    Attributes:
        images: How many were drawn together; 0 where nobody knows.
        calls: Arguments of each call by path, in order.
        spec: How they are nested.
        answer: What the model returned at the first one.
        lists: Arguments that are lists with a tensor for each row; then each row is a call.
        cut: How prompts are cut to their length; then each row is a call too.
    """

    images: int
    calls: tuple[Mapping[LeafPath, Any], ...]
    spec: TreeSpec
    answer: Any = None
    lists: frozenset[str] = frozenset()
    cut: Cut | None = None


def plan_of(
    signature: inspect.Signature, runs: Sequence[RecordedRun], where: str, named: Drawing | None = None
) -> CallPlan:
    """Tell the roles of all arguments.

    Args:
        runs: Of the same pipeline; the roles of what depends on prompt and number of images show between them.
        named: Roles that the user told.
    Raises:
        LoadError: the calls differ in form, or no argument behaves as a sample or as a timestep does.
        ConfigError: no argument has the name that it was told by.
    """
    first, *others = runs
    if any(run.spec != first.spec for run in others):
        raise LoadError(
            f"{where}: the model is called in another form from run to run, with lists as long as the prompt or as the "
            "number of images; a graph cannot take them"
        )
    values = {path: _Values(path, runs) for path in first.calls[0]}
    asked = (None, None) if named is None else (named.timestep, named.sample)
    given = [None if name is None else _by_name(name, values, where) for name in asked]
    timestep = _timestep(values, where, given[0])
    sample = _sample(values, timestep, where, given[1], first.answer)
    starred = signature.parameters[str(sample[0])].kind is inspect.Parameter.VAR_POSITIONAL
    if any(isinstance(key, int) for key in sample[2 if starred else 1 :]):
        raise LoadError(
            f"{where}: the model takes its sample in a list ({Leaf(sample).place}), and does not return as many "
            "tensors in a list; a graph takes a batch, one row for each image"
        )
    rows = [run.calls[0][sample].shape[0] for run in runs]
    told = (sample, timestep)
    names = _names([path for path, found in values.items() if path in told or found.is_input or found.is_given(rows)])
    leaves = tuple(
        replace(
            _leaf(found, names.get(path), rows, path == timestep, where),
            listed=path[0] in first.lists,
            counts=names[first.cut.tokens] if first.cut and path == first.cut.mask else "",
        )
        for path, found in values.items()
    )
    return CallPlan(signature, first.spec, leaves, names[sample], names[timestep])


class _Values:
    """What one leaf was in all calls."""

    def __init__(self, path: LeafPath, runs: Sequence[RecordedRun]) -> None:
        self.path = path
        self.runs = [[call[path] for call in run.calls] for run in runs]
        self.images = [run.images for run in runs]
        self.first = self.runs[0][0]
        self.is_tensor = isinstance(self.first, Tensor)
        self.changes_within = any(not same(run[0], value) for run in self.runs for value in run[1:])
        self.changes_between = any(not same(self.runs[0][0], run[0]) for run in self.runs[1:])

    @property
    def is_always_tensor(self) -> bool:
        return all(isinstance(value, Tensor) for run in self.runs for value in run)

    @property
    def is_input(self) -> bool:
        """Whether it is more than a constant of the model's geometry."""
        return self.changes_within or self.changes_between or self.follows_images

    def is_given(self, rows: Sequence[int]) -> bool:
        """Whether it looks like a prompt or a picture that was the same in all runs.

        Where no run draws more images than another, nothing tells it from a constant but its rows.
        """
        unknown = len(set(self.images)) == 1
        return unknown and self.is_tensor and self.first.ndim > 1 and self.sizes == list(rows)

    @property
    def sizes(self) -> list[int]:
        """Of axis 0, in each run."""
        return [run[0].shape[0] if run[0].ndim else 0 for run in self.runs]

    @property
    def follows_images(self) -> bool:
        """Whether axis 0 grows with the number of images."""
        return self.is_tensor and len(set(self.sizes)) > 1

    @property
    def is_one_number(self) -> bool:
        """Whether each call has a single number, however often repeated."""
        return all(_one_number(value) for run in self.runs for value in run)

    @property
    def distinct(self) -> int:
        """How many values it takes in the first run: a branch of guidance a few, a sample one at every step."""
        kept: list[Any] = []
        for value in self.runs[0]:
            if not any(same(value, each) for each in kept):
                kept.append(value)
        return len(kept)


def _by_name(name: str, values: Mapping[LeafPath, _Values], where: str) -> LeafPath:
    found = [path for path in values if name in (Leaf(path).place, path[-1])]
    if len(found) == 1:
        return found[0]
    places = ", ".join(Leaf(path).place for path in found or values)
    if found:
        raise ConfigError(f"{where}: {name!r} is one of {places}; name it as it stands here")
    raise ConfigError(f"{where}: the model is called without an argument {name!r}; it is called with {places}")


def _timestep(values: Mapping[LeafPath, _Values], where: str, given: LeafPath | None) -> LeafPath:
    numbers = [path for path, found in values.items() if found.is_one_number]
    if given is not None:
        if given not in numbers:
            raise ConfigError(f"{where}: {Leaf(given).place} is no timestep: one number in each call")
        return given
    found = [path for path in numbers if values[path].changes_within] or [
        path for path in numbers if path[-1] in TIMESTEP_NAMES
    ]
    if not found:
        raise LoadError(
            f"{where}: no argument of the model behaves as a timestep does: one number that changes from call to call; "
            f"it is called with {', '.join(Leaf(path).place for path in values)}"
        )
    named = [path for path in found if path[-1] in TIMESTEP_NAMES]
    return (named or found)[0]


def _sample(
    values: Mapping[LeafPath, _Values], timestep: LeafPath, where: str, given: LeafPath | None, answer: Any
) -> LeafPath:
    floats = [
        path
        for path, found in values.items()
        if path != timestep and found.is_tensor and found.first.is_floating_point() and found.first.ndim > 1
    ]
    if given is not None:
        if given not in floats:
            raise ConfigError(f"{where}: {Leaf(given).place} is no noisy sample: floating-point numbers, [N, ...]")
        return given
    moving = {
        path: values[path].distinct for path in floats if values[path].changes_within or values[path].changes_between
    }
    if not moving:
        raise LoadError(
            f"{where}: no argument of the model behaves as a noisy sample does: floating-point numbers, [N, ...], that "
            f"change at every call; it is called with {', '.join(Leaf(path).place for path in values)}"
        )
    most = max(moving.values())
    if most > values[timestep].distinct:  # more often than the timestep, as the texts of guidance in a run of one step
        predicted = next((x.shape for x in tree_leaves(answer) if isinstance(x, Tensor)), None)
        moving = {path: count for path, count in moving.items() if values[path].first.shape == predicted} or moving
        most = max(moving.values())
    return next(path for path, count in moving.items() if count == most)


def _why_not(found: _Values) -> str:
    """Why a graph cannot take an argument that is not always a tensor, and what to do."""
    values = [value for run in found.runs for value in run]
    if any(value is None for value in values) and any(isinstance(value, Tensor) for value in values):
        return "is None in one call and a tensor in another; give zeros, or what else stands for nothing, in its place"
    return (
        "is no tensor and changes from call to call; a graph has one form: make it a tensor, or put the calls of a "
        "step into one module and draw with that"
    )


def _leaf(found: _Values, name: str | None, rows: Sequence[int], timestep: bool, where: str) -> Leaf:
    if name is None:
        return Leaf(found.path, value=found.first)
    place = Leaf(found.path).place
    if timestep:
        return _timestep_leaf(found, name, rows)
    if not found.is_always_tensor:
        raise LoadError(f"{where}: argument {place} {_why_not(found)}")
    if len({value.ndim for run in found.runs for value in run}) > 1:
        raise LoadError(f"{where}: argument {place} has more axes in one call than in another; a graph cannot take it")
    axis, fold = _row_axis(found, rows)
    if not fold:
        sizes = [str(list(run[0].shape)) for run in found.runs]
        raise LoadError(
            f"{where}: argument {place} is {' and '.join(sizes)} where the sample has "
            f"{' and '.join(map(str, rows))} rows; it changes, so it must have a row for each row of the sample"
        )
    flat = [value.movedim(axis, 0) for run in found.runs for value in run]
    inner = [place for place in range(1, flat[0].ndim) if len({value.shape[place] for value in flat}) > 1]
    return Leaf(found.path, name, fold, axis, tuple(place + (fold > 1) for place in inner))


def _row_axis(found: _Values, rows: Sequence[int]) -> tuple[int, int]:
    """Where a leaf has rows for those of the sample, and how many for each; 0 where nowhere."""
    pairs = list(zip(found.runs, rows, strict=True))
    by_axis = [[run[0].shape[axis] for run, _ in pairs] for axis in range(found.first.ndim)]
    for axis, sizes in enumerate(by_axis):
        if sizes == list(rows):
            return axis, 1
    if by_axis and set(by_axis[0]) == {1}:
        return 0, 1
    for axis, sizes in enumerate(by_axis):
        folds = {size / count for size, count in zip(sizes, rows, strict=True)}
        if len(folds) == 1 and min(folds) >= 1 and min(folds).is_integer() and len(set(rows)) > 1:
            return axis, int(min(folds))
    return 0, 0


def _timestep_leaf(found: _Values, name: str, rows: Sequence[int]) -> Leaf:
    if not found.is_tensor or not found.first.ndim:
        return Leaf(found.path, name)
    if found.first.ndim > 1:
        return Leaf(found.path, name, 1, repeated=tuple(found.first.shape[1:]))
    sizes = found.sizes
    return Leaf(found.path, name, max(1, sizes[0] // rows[0]))


def _names(paths: Sequence[LeafPath]) -> dict[LeafPath, str]:
    """A short name for each input that no other has: the last word of its path, with the positions behind it.

    No name of Python's own (``input``, ``type``): a captured graph would call it otherwise.
    """
    short = {path: _name(_last_word(path)) for path in paths}
    often = Counter(short.values())
    names: dict[LeafPath, str] = {}
    for path, name in short.items():
        name = name if often[name] == 1 else _name(path)
        while name in names.values():
            name += "_"
        names[path] = name
    return names


def _last_word(path: LeafPath) -> LeafPath:
    words = [place for place, key in enumerate(path) if isinstance(key, str)]
    return path[words[-1] :]


def _name(path: LeafPath) -> str:
    name = re.sub(r"\W", "_", "_".join(str(key) for key in path))
    return f"{name}_" if keyword.iskeyword(name) or hasattr(builtins, name) or name[:1].isdigit() else name


def _one_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0 and value.dtype.is_complex is False and bool((value == value.reshape(-1)[0]).all())
    return isinstance(value, int | float) and not isinstance(value, bool)
