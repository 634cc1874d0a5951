"""JSON and TOML from files, and frozen dataclasses from it, by their own annotations."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

LARGEST_TOML = 1 << 15
"""Bytes."""


def parsed(text: str) -> Any:
    """JSON as plain data.

    Raises:
        ValueError: it is none, or is nested more deeply than anything that we write.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object.
    """
    return _object(parsed(path.read_text("utf-8")), "file")


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TOML, or larger than settings are: reading time grows with the square of the size.
    """
    if path.stat().st_size > LARGEST_TOML:
        raise ValueError(f"{path.stat().st_size} bytes, settings have {LARGEST_TOML} at most")
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # editors put a mark in front
    except RecursionError:
        raise ValueError("nested too deeply") from None


def build(kind: Any, value: object, where: str = "") -> Any:
    """A value of the annotated kind: dataclasses from objects, tuples from lists, numbers, text, truth values.

    Args:
        kind: A dataclass, or any annotation one may have: ``tuple[X, ...]``, ``Mapping[str, X]``, ``X | None``, ...
        where: Name of the value in messages.
    Raises:
        ValueError: something is missing, unknown or of another kind; says where.
    """
    if is_dataclass(kind):
        return _dataclass(kind, _object(value, where), where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return _either(inner, value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is Mapping:
        return {key: build(inner[1], each, f"{where}.{key}") for key, each in _object(value, where).items()}
    if origin is Literal:
        fits = value in inner
    elif kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{where}: got {_short(value)}")
    try:
        return float(value) if kind is float and isinstance(value, int | float) else value
    except OverflowError:
        raise ValueError(f"{where}: a number of {len(str(value))} digits") from None


def _short(value: object) -> str:
    """For messages, which are a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_short(value)}")
    return value


def _dataclass(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known, prefix = {field.name: field for field in fields(kind)}, f"{where}." if where else ""
    unknown = values.keys() - known.keys()
    if unknown:
        raise ValueError(f"{prefix}{min(unknown)}: unknown")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{prefix}{name}: missing")
    return kind(**{name: build(_hints(kind)[name], value, f"{prefix}{name}") for name, value in values.items()})


def _either(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    *first, last = [kind for kind in kinds if kind is not NoneType]
    for kind in first:
        try:
            return build(kind, value, where)
        except ValueError:
            continue
    return build(last, value, where)


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {_short(value)}")
    each = [kinds[0]] * len(value) if kinds[1:] == (...,) else list(kinds)
    if len(each) != len(value):
        raise ValueError(f"{where}: expected {len(each)} values, got {len(value)}")
    return tuple(
        build(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(zip(each, value, strict=True))
    )
