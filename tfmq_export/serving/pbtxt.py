"""Protobuf text format, written without protobuf: the form of Triton's ``config.pbtxt``."""

import json
from collections.abc import Iterator, Mapping, Sequence

INDENT = "  "


class Symbol(str):
    """The name of an enum value, which stands without quotes."""

    __slots__ = ()


Scalar = Symbol | str | int | bool
Value = Scalar | Sequence["Value"] | Mapping[str, "Value"]
Message = Mapping[str, Value]
"""Fields by name, in the order they are written; a list is a repeated field."""


def render(message: Message) -> str:
    """The text of a message, which ``text_format`` reads back.

    Lists of scalars take one line, also empty ones; each message of a list is a block of its own.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def map_entries(entries: Mapping[str, Value]) -> list[Message]:
    """A ``map`` field: text format spells it as repeated key and value."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, str | int):
            yield f"{name}: {_scalar(value)}"
        else:
            blocks = [item for item in value if isinstance(item, Mapping)]
            for block in blocks:
                yield from _block(name, block)
            if not blocks:
                items = ", ".join(_scalar(item) for item in value if isinstance(item, str | int))
                yield f"{name}: [ {items} ]" if items else f"{name}: [ ]"


def _block(name: str, message: Message) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"{INDENT}{line}" for line in _lines(message))
    yield "}"


def _scalar(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Symbol | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)  # text format knows all of JSON's escapes but \uXXXX for controls
