"""Prompts that a model cuts to their own length.

A mask says with ones where a prompt's tokens are, and with zeros where padding is. A model that reads the sums of its
rows as numbers of Python computes on each prompt without its padding, and has no graph: its shapes follow data. Prompts
cut before the call have the same prediction, and then those numbers are a size of an input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tfmq_export.bundle.call import LeafPath

READS = (Tensor.item, Tensor.tolist, Tensor.__int__)
"""How numbers get from tensors into Python."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A mask whose sums a model reads, and the tokens that it belongs to, [rows, tokens, ...]."""

    mask: LeafPath
    tokens: LeafPath


class NumbersRead(TorchFunctionMode):
    """Notes the numbers that are read off tensors meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in READS:
            self.numbers += torch.as_tensor(found).reshape(-1).tolist()
        return found


class SizeRead(TorchFunctionMode):
    """Gives a size for each number that is read off a tensor meanwhile.

    Args:
        size: May be one that varies, while a graph is captured.
    """

    def __init__(self, size: Any) -> None:
        super().__init__()
        self._size = size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return [self._size] * args[0].shape[0] if func is Tensor.tolist else self._size
        return func(*args, **(kwargs or {}))


def cut_of(arguments: Mapping[LeafPath, Any], numbers: Sequence[float]) -> Cut | None:
    """The mask whose sums a model read; None where it read nothing, or something else.

    Args:
        arguments: Of one call.
        numbers: All that the model read off tensors.
    """
    for path, mask in arguments.items():
        if not isinstance(mask, Tensor) or mask.ndim != 2 or list(numbers) != mask.sum(1).tolist():
            continue
        tokens = [key for key, value in arguments.items() if _is_of(value, mask)]
        if tokens and _ones_first(mask):
            return Cut(path, tokens[0])
    return None


def cut_rows(arguments: Mapping[LeafPath, Any], cut: Cut) -> list[dict[LeafPath, Any]]:
    """A call as calls of prompts of one length each, without padding; the mask is its type alone."""
    lengths = arguments[cut.mask].sum(1).tolist()
    starts = [row for row, length in enumerate(lengths) if row == 0 or length != lengths[row - 1]]
    parts = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]
    return [_cut(arguments, cut, part) for part in parts]


def cut_prompts(arguments: Mapping[LeafPath, Any], cut: Cut) -> list[dict[LeafPath, Any]]:
    """The same as calls of one prompt each."""
    return [_cut(arguments, cut, slice(row, row + 1)) for row in range(len(arguments[cut.mask]))]


def _cut(arguments: Mapping[LeafPath, Any], cut: Cut, part: slice) -> dict[LeafPath, Any]:
    """Rows of one length."""
    mask = arguments[cut.mask]
    found = {
        path: value[part] if isinstance(value, Tensor) and value.ndim and len(value) == len(mask) else value
        for path, value in arguments.items()
    }
    length = int(mask[part.start].sum())
    return {**found, cut.mask: mask.dtype, cut.tokens: found[cut.tokens][:, :length]}


def _is_of(value: Any, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and value.shape[:2] == mask.shape and value.is_floating_point()


def _ones_first(mask: Tensor) -> bool:
    numbers = mask.to(torch.int64)
    return bool((numbers.sum(1) > 0).all()) and torch.equal(
        numbers, numbers.clamp(0, 1).sort(1, descending=True).values
    )
