"""A module left as it was found.

Modules may keep what they compute: rotary tables in an attribute, masks by size in a dict, anything behind
``functools.lru_cache``. What they keep while they are captured are stand-ins without numbers, and the module would
return those from then on.
"""

import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]
LEAVES = (Tensor, torch.Size, torch.dtype, torch.device, type, ModuleType, str, bytes, int, float, complex, type(None))
LIBRARIES = ("torch", "builtins", "collections", "functools")
"""Whose own objects keep nothing of a model."""


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Take back what the module keeps of the calls inside: attributes, containers in them, cached functions.

    Tensors that it changes in place stay changed.
    """
    undo: list[Undo] = []
    seen: set[int] = set()
    _remember(module, undo, seen)
    for space in _namespaces(module):
        undo += [_cleared_if_grown(value) for value in space.values() if _is_cached(value)]
        for value in space.values():
            if type(value) in (dict, list, set):  # a table that the file keeps
                _remember(value, undo, seen)
    try:
        yield
    finally:
        for step in undo:
            step()


def _remember(value: Any, undo: list[Undo], seen: set[int]) -> None:
    """Note everything that can change behind a value."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, LEAVES) or (callable(value) and not isinstance(value, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, MutableMapping):
            undo.append(_restored_mapping(value, dict(value)))
            stack.extend(value.values())
        elif isinstance(value, list):
            undo.append(_restored_list(value, list(value)))
            stack.extend(value)
        elif isinstance(value, set):
            undo.append(_restored_set(value, set(value)))
        elif isinstance(value, tuple):
            stack.extend(value)
        elif isinstance(value, nn.Module) or not type(value).__module__.startswith(LIBRARIES):
            stack.append(getattr(value, "__dict__", None))


def _restored_mapping(held: MutableMapping[Any, Any], before: dict[Any, Any]) -> Undo:
    def undo() -> None:
        for key in [key for key in held if key not in before]:
            del held[key]
        for key, value in before.items():
            if held.get(key, undo) is not value:
                held[key] = value

    return undo


def _restored_list(held: list[Any], before: list[Any]) -> Undo:
    def undo() -> None:
        held[:] = before

    return undo


def _restored_set(held: set[Any], before: set[Any]) -> Undo:
    def undo() -> None:
        held.intersection_update(before)
        held.update(before)

    return undo


def files_of(module: nn.Module) -> set[str]:
    """Names of the loaded Python modules that the classes of a module and of its parts come from, libraries apart."""
    return {kind.__module__ for kind in _own_classes(module) if kind.__module__ in sys.modules}


def _own_classes(module: nn.Module) -> set[type]:
    kinds = {kind for part in module.modules() for kind in type(part).__mro__ if kind is not object}
    return {kind for kind in kinds if not kind.__module__.startswith(LIBRARIES)}


def _namespaces(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where the module's own classes and files keep functions."""
    for space in (*_own_classes(module), *(sys.modules[name] for name in files_of(module))):
        yield {name: value for name, value in vars(space).items() if not name.startswith("__")}


def _is_cached(value: Any) -> bool:
    return callable(getattr(_function(value), "cache_clear", None)) and hasattr(_function(value), "cache_info")


def _function(value: Any) -> Any:
    return getattr(value, "__func__", value)  # of a static or class method


def _cleared_if_grown(value: Any) -> Undo:
    function = _function(value)
    misses = function.cache_info().misses

    def undo() -> None:
        if function.cache_info().misses != misses:
            function.cache_clear()

    return undo
