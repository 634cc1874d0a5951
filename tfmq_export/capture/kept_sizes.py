"""Sizes that stay sizes while a module is traced: ``int(x.shape[1])`` and ``len(x)`` are numbers in Python alone.

Tracing takes such a number for a constant, and the graph then holds for that size only. In the files of the model's own
classes both words are lent another meaning meanwhile: they leave a size that varies as it is, and do to all else what
they always do.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_export.capture.untouched import files_of


class _OfInt(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)


class _Int(int, metaclass=_OfInt):
    """``int``, but a size that varies is one already."""

    def __new__(cls, *args: Any, **named: Any) -> Any:
        return args[0] if args and isinstance(args[0], torch.SymInt) else int(*args, **named)


class _OfSet(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, set)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, set)


class _Set(set[Any], metaclass=_OfSet):
    """``set``, but one size that varies, which has no hash, is a set of one."""

    def __new__(cls, *args: Any) -> Any:
        values = list(args[0]) if args else []
        return tuple(values) if len(values) == 1 and isinstance(values[0], torch.SymInt) else set(values)


def _len(value: Any) -> Any:
    """``len``, but that of a tensor may vary."""
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else len(value)


@contextmanager
def sizes_kept(module: nn.Module) -> Iterator[None]:
    """Let ``int``, ``len`` and ``set`` keep sizes that vary, in the files that a module's classes come from."""
    lent = []
    for name in files_of(module):
        space = vars(sys.modules[name])
        for word, meaning in (("int", _Int), ("len", _len), ("set", _Set)):
            if word not in space:
                space[word] = meaning
                lent.append((space, word))
    try:
        yield
    finally:
        for space, word in lent:
            del space[word]
