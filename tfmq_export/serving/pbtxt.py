"""Protobuf text format, written and read without protobuf: the form of Triton's ``config.pbtxt``."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

INDENT = "  "


class Symbol(str):
    """What stands without quotes: the name of an enum value, a truth value or a real number."""

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


def parse(text: str) -> Message:
    """The fields of a message, such that ``render`` writes what means the same; comments are lost.

    A field that stands once is its value, one that stands several times a list. Which of them may repeat, only the
    schema knows: ``repeated`` takes both.

    Raises:
        ValueError: it is not text format; says at which line.
    """
    tokens = _Tokens(text)
    return _fields(tokens, end="")


def repeated(value: Value | None) -> list[Value]:
    """The values of a field that may repeat, of which there may be none or one."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


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


_TOKEN = re.compile(
    r"""(?P<space> \s+ | \#[^\n]*)
      | (?P<text> "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*')
      | (?P<word> [\w.+-]+)
      | (?P<mark> [{}<>\[\]:,;])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    rb"\\(?:(?P<octal>[0-7]{1,3})|x(?P<byte>[0-9a-fA-F]{1,2})|u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8})|(.))",
    re.DOTALL,
)
_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_CLOSING = {"{": "}", "<": ">"}


class _Tokens:
    """Words, texts in quotes and punctuation, one after the other; ``kind`` and ``value`` are of the next one."""

    def __init__(self, text: str) -> None:
        self._text, self._end = text, 0
        self.advance()

    def advance(self) -> None:
        """Go to the next; kind and value are empty at the end."""
        while True:
            start = self._end
            found = _TOKEN.match(self._text, start)
            if found is None:
                self.kind = self.value = ""
                if start < len(self._text):
                    raise self.unexpected(self._text[start])
                return
            self._end = found.end()
            self.kind, self.value = str(found.lastgroup), found[0]
            if self.kind != "space":
                return

    def take(self, mark: str) -> bool:
        """Go on if the next one is this mark."""
        if self.kind != "mark" or self.value != mark:
            return False
        self.advance()
        return True

    def unexpected(self, value: str) -> ValueError:
        line = self._text.count("\n", 0, self._end) + 1
        return ValueError(f"line {line}: {value!r} is not expected" if value else "it ends too early")


def _fields(tokens: _Tokens, end: str) -> Message:
    """Fields up to the mark that closes them, or to the end of all."""
    found: dict[str, list[Value]] = {}
    while not (tokens.take(end) if end else not tokens.kind):
        name = tokens.value
        if tokens.kind != "word" or not name.isidentifier():
            raise tokens.unexpected(name)
        tokens.advance()
        tokens.take(":")
        if tokens.take("["):
            found.setdefault(name, []).extend(_list(tokens))
        else:
            found.setdefault(name, []).append(_value(tokens))
        if not tokens.take(","):
            tokens.take(";")
    # Of one value alone, the form without brackets: only that is right whether or not the field may repeat.
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _list(tokens: _Tokens) -> list[Value]:
    values: list[Value] = []
    while not tokens.take("]"):
        if values and not tokens.take(","):
            raise tokens.unexpected(tokens.value)
        values.append(_value(tokens))
    return values


def _value(tokens: _Tokens) -> Value:
    kind, value = tokens.kind, tokens.value
    if kind == "mark" and value in _CLOSING:
        tokens.advance()
        return _fields(tokens, _CLOSING[value])
    if kind == "word":
        tokens.advance()
        return int(value) if re.fullmatch(r"-?(0|[1-9][0-9]*)", value) else Symbol(value)
    if kind != "text":
        raise tokens.unexpected(value)
    parts = []
    while tokens.kind == "text":  # texts that follow each other are one
        parts.append(_unescaped(tokens.value[1:-1]))
        tokens.advance()
    return "".join(parts)


def _unescaped(text: str) -> str:
    def plain(found: re.Match[bytes]) -> bytes:
        if found["octal"] or found["byte"]:
            return bytes([int(found["octal"], 8) & 0xFF if found["octal"] else int(found["byte"], 16)])
        point = found["short"] or found["long"]
        return chr(int(point, 16)).encode() if point else _ESCAPES.get(found[5], found[5])

    return _ESCAPE.sub(plain, text.encode()).decode()
