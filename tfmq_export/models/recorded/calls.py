"""Calls of a module as flat tensors by name, and back: the one place that knows how arguments are nested."""

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_leaves, tree_unflatten

from tfmq_export.bundle.call import LeafPath, of_one_shape, written
from tfmq_export.errors import LoadError
from tfmq_export.models.recorded.lengths import Cut, SizeRead, cut_rows

Forward = Callable[..., Any]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One value inside the arguments of a call.

    Attributes:
        name: Of the flat input it is; None for a constant.
        fold: Rows of its axis 0 for each row of the sample; 0 where it has no such axis.
        axis: Where these rows are, if not in front.
        ragged: Axes of the flat input, behind the rows, whose size is another one from call to call.
        repeated: Further axes that a timestep is repeated over, [N, *repeated].
        value: Of a constant.
        listed: Whether it is a list with a tensor for each row.
        counts: Of a mask that is all ones, for prompts without padding: name of the input with the tokens. Its value
            is its type.
    """

    path: LeafPath
    name: str | None = None
    fold: int = 0
    axis: int = 0
    ragged: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    value: Any = None
    listed: bool = False
    counts: str = ""

    @property
    def place(self) -> str:
        """The path as people write it."""
        return written(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class CallPlan:
    """What every call of a module looks like.

    Attributes:
        signature: Of its ``forward``, without self.
        spec: How its arguments are nested.
        leaves: In the order of ``spec``.
        sample: Name of the noisy sample.
        timestep: Name of the timestep.
    """

    signature: inspect.Signature
    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    sample: str
    timestep: str

    @property
    def inputs(self) -> dict[str, Leaf]:
        """The leaves that are inputs, by name."""
        return {leaf.name: leaf for leaf in self.leaves if leaf.name is not None}

    @property
    def lists(self) -> frozenset[str]:
        """Arguments that are lists with a tensor for each row."""
        return frozenset(str(leaf.path[0]) for leaf in self.leaves if leaf.listed)

    def flat(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """The inputs of one call, one row per row of the sample: [N, ...], and [] for a timestep that is one number.

        Where a model takes lists, neighbouring rows of one shape are a batch; else there is one.

        Raises:
            LoadError: the call is another one than those recorded.
        """
        arguments, spec = flattened(self.signature, args, named, self.lists)
        if spec != self.spec:
            before = _names(leaf.path for leaf in self.leaves)
            raise LoadError(
                f"the model is called with {_names(arguments)} this time, before with {before}; a graph takes one form"
            )
        return [self.flat_values(part) for part in self.batches(arguments)]

    @property
    def cut(self) -> Cut | None:
        """The mask that prompts are cut by."""
        mask = next((leaf for leaf in self.leaves if leaf.counts), None)
        return None if mask is None else Cut(mask.path, self.inputs[mask.counts].path)

    def batches(self, arguments: Mapping[LeafPath, Any]) -> list[dict[LeafPath, Any]]:
        """The values of a call as calls of one shape each, by path."""
        if self.cut is not None:
            return cut_rows(arguments, self.cut)
        return batches(arguments, self.lists)

    def flat_values(self, arguments: Mapping[LeafPath, Any]) -> dict[str, Tensor]:
        """The same of a recorded call, by path."""
        rows = len(arguments[self.inputs[self.sample].path])
        found = {}
        for leaf, value in zip(self.leaves, arguments.values(), strict=True):
            if leaf.name is None:
                if not same(leaf.value, value):
                    raise LoadError(
                        f"argument {leaf.place} was the same in every recorded call and is another one now; the graph "
                        "holds it as a constant"
                    )
                continue
            found[leaf.name] = _unfolded(leaf, torch.as_tensor(value), rows, timestep=leaf.name == self.timestep)
        return found

    def call(self, flat: Mapping[str, Tensor], held: Mapping[LeafPath, Tensor] | None = None) -> inspect.BoundArguments:
        """The arguments of one call from its inputs.

        Args:
            held: Constants that take the place of the plan's own, by path.
        """
        constants = held or {}
        values = [
            flat[leaf.counts].new_ones(flat[leaf.counts].shape[:2], dtype=leaf.value)
            if leaf.counts
            else constants.get(leaf.path, leaf.value)
            if leaf.name is None
            else _folded(leaf, flat[leaf.name])
            for leaf in self.leaves
        ]
        return inspect.BoundArguments(self.signature, tree_unflatten(values, self.spec))


class FlatModule(nn.Module):
    """A module as a function of flat tensors by name; ``flat_module`` makes one whose signature has the names."""

    def __init__(self, model: nn.Module, plan: CallPlan) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        held = [leaf for leaf in plan.leaves if leaf.name is None and isinstance(leaf.value, Tensor)]
        self._held = {leaf.path: f"constant_{number}" for number, leaf in enumerate(held)}
        for leaf in held:
            self.register_buffer(self._held[leaf.path], leaf.value, persistent=False)

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        """What the model returns; a list with a tensor for each row as one tensor."""
        flat = {**dict(zip(self.plan.inputs, args, strict=False)), **named}
        bound = self.plan.call(flat, {path: getattr(self, buffer) for path, buffer in self._held.items()})
        cut = next((leaf.counts for leaf in self.plan.leaves if leaf.counts), "")
        with SizeRead(flat[cut].shape[1]) if cut else contextlib.nullcontext():
            answer = forward_of(self.model)(*bound.args, **bound.kwargs)
        rows = listed_answer(answer) if self.plan.lists else None
        return answer if rows is None else torch.stack(rows)


def flat_module(model: nn.Module, plan: CallPlan) -> FlatModule:
    """A module as a function of flat tensors; ``torch.export`` reads their names off its signature."""

    def forward(self: FlatModule, *args: Tensor, **named: Tensor) -> Any:
        return FlatModule.forward(self, *args, **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *plan.inputs)])  # type: ignore[attr-defined]
    flat: FlatModule = type("FlatModule", (FlatModule,), {"forward": forward})(model, plan)
    return flat


@contextmanager
def answering(module: nn.Module, reply: Forward) -> Iterator[None]:
    """Let something else answer every call of a module: whatever calls it, and by whatever reference."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = reply
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def forward_of(module: nn.Module) -> Forward:
    """The module's own computation, also while something else answers for it; no hooks run."""
    return type(module).forward.__get__(module)


def signature_of(module: nn.Module) -> inspect.Signature:
    """Of its own ``forward``, without self."""
    return inspect.signature(forward_of(module))


def flattened(
    signature: inspect.Signature, args: Sequence[Any], named: Mapping[str, Any], lists: Collection[str] = ()
) -> tuple[dict[LeafPath, Any], TreeSpec]:
    """The values inside the arguments of a call by their paths, in order, and how they are nested.

    Half precision becomes single, in which the module computes here, and numbers of numpy become Python's.

    Args:
        lists: Arguments that are one value each, for ``batches``.
    """
    return leaves_of(signature.bind(*args, **named).arguments, lists)


def leaves_of(arguments: Mapping[str, Any], lists: Collection[str] = ()) -> tuple[dict[LeafPath, Any], TreeSpec]:
    """The same of arguments by name."""
    whole = [arguments[name] for name in lists if name in arguments]
    leaves, spec = tree_flatten_with_path(dict(arguments), is_leaf=lambda value: any(value is x for x in whole))
    return {tuple(_key(each) for each in path): _single(value) for path, value in leaves}, spec


def half_of(values: Iterable[Any]) -> torch.dtype | None:
    """The type of half precision that a call is made in, where all but its numbers are: else the model casts itself."""
    maps = [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1]
    return maps[0].dtype if maps and all(value.dtype in HALVES for value in maps) else None


def _single(value: Any) -> Any:
    if is_list(value):
        return [_single(each) for each in value]
    if isinstance(value, Tensor) and value.dtype in HALVES:
        return value.float()
    return value.item() if isinstance(value, np.generic) else value


def batches(arguments: Mapping[LeafPath, Any], lists: Collection[str]) -> list[dict[LeafPath, Any]]:
    """The values of a call whose lists have a tensor for each row, as calls with tensors, [N, ...], of one shape each.

    Args:
        arguments: From ``flattened``.
    """
    if not lists:
        return [dict(arguments)]
    return [_rows(arguments, lists, part) for part in of_one_shape([arguments[name,] for name in lists])]


def each_row(arguments: Mapping[LeafPath, Any], lists: Collection[str]) -> list[dict[LeafPath, Any]]:
    """The same as calls of one row each."""
    count = len(arguments[min(lists),])
    return [_rows(arguments, lists, slice(row, row + 1)) for row in range(count)]


def _rows(arguments: Mapping[LeafPath, Any], lists: Collection[str], part: slice) -> dict[LeafPath, Any]:
    count = len(arguments[min(lists),])
    found = {}
    for path, value in arguments.items():
        if path[0] in lists:
            found[path] = torch.stack(list(value[part]))
        else:
            of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            found[path] = value[part] if of_rows else value
    return found


def listed_answer(answer: Any) -> list[Tensor] | None:
    """The list of tensors that a model returns for its prediction, one for each row; None if it returns a tensor."""
    leaves = tree_leaves(answer, is_leaf=is_list)
    found: Any = next((leaf for leaf in leaves if is_list(leaf) or isinstance(leaf, Tensor)), None)
    return list(found) if is_list(found) else None


def is_list(value: Any) -> bool:
    """Whether a value is a list of tensors."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, Tensor) for each in value)


def _key(step: Any) -> str | int:
    """One step of torch's paths: a key, or a position."""
    found: str | int = getattr(step, "key", getattr(step, "idx", str(step)))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values of a leaf are equal, number by number."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # arrays, which compare element by element
        return one is other


def _unfolded(leaf: Leaf, value: Tensor, rows: int, *, timestep: bool) -> Tensor:
    """One row for each row of the sample; graphs compute in single precision."""
    value = value.float() if value.dtype == torch.float64 else value
    if not leaf.fold:
        return value.reshape(()) if timestep else value
    if timestep:  # the same number for all that belongs to a row
        each = value.reshape(-1)[:: max(1, value.numel() // rows)]
        return each.expand(rows)
    value = value.movedim(leaf.axis, 0)
    if leaf.fold > 1:
        return value.reshape(rows, leaf.fold, *value.shape[1:])
    return value.expand(rows, *value.shape[1:]) if len(value) == 1 else value


def _folded(leaf: Leaf, value: Tensor) -> Tensor | list[Tensor]:
    if leaf.listed:
        return list(value.unbind(0))
    if leaf.repeated:
        return value.reshape(-1, *[1] * len(leaf.repeated)).expand(-1, *leaf.repeated)
    if leaf.fold > 1:
        value = value.repeat_interleave(leaf.fold) if value.ndim == 1 else value.flatten(0, 1)
    return value.movedim(0, leaf.axis)


def _names(paths: Iterable[LeafPath]) -> str:
    return ", ".join(written(path) for path in paths)
