"""Altered files: bytes, values of JSON, members of containers. All of it is drawn from one seeded generator."""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Alteration = Callable[[Random, bytes], bytes]

DEEP = 100_000
DEEP_TEXTS = ("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "1" + "0" * 5000, "1e999", "-1e-999")
"""JSON that no Python object stands for."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../../etc/passwd", "\0", "\ud83d", "x" * 10_000, [], [[]], {}, {"a": 1}, [1, 2, 3],
    [None] * 1000, {str(at): at for at in range(100)}, [10**12, 10**12], "void", "float32", b"\xff".decode("latin-1"),
)  # fmt: skip
MARK = "@@fuzz@@"


def of_bytes(drawn: Random, content: bytes) -> bytes:
    """Some bytes flipped, cut, put in, doubled or zeroed; one to four times."""
    altered = bytearray(content)
    for _ in range(drawn.randint(1, 4)):
        at, length = drawn.randint(0, len(altered)), drawn.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = drawn.randrange(6)
        if kind == 0 and at < len(altered):
            altered[at] ^= 1 << drawn.randrange(8)
        elif kind == 1 and at < len(altered):
            altered[at] = drawn.randrange(256)
        elif kind == 2:
            del altered[drawn.choice((at, len(altered) - min(length, len(altered)))) :]
        elif kind == 3:
            altered[at:at] = drawn.randbytes(length)
        elif kind == 4:
            altered[at:at] = altered[at : at + length]
        else:
            altered[at : at + length] = bytes(len(altered[at : at + length]))
    return bytes(altered)


def of_value(drawn: Random, document: Any) -> Any:
    """A copy of plain data with one to three places altered: another value, gone, added, or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(drawn.randint(1, 3)):
        holder, place = _place(drawn, document)
        if place is None:
            return drawn.choice(VALUES)
        kind = drawn.randrange(8)
        if kind == 0:
            del holder[place]
        elif kind == 1 and isinstance(holder, dict):
            holder[drawn.choice(("extra", "", str(place) + "_"))] = holder[place]
        elif kind == 1:
            holder.insert(place, holder[place])
        elif kind == 2:
            other, where = _place(drawn, document)
            holder[place] = copy.deepcopy(other[where])
        else:
            holder[place] = copy.deepcopy(drawn.choice(VALUES))
    return document


def of_json(drawn: Random, content: bytes) -> bytes:
    """JSON with values altered, and now and then something that no parser should follow."""
    if drawn.random() < 0.2:
        return of_bytes(drawn, content)
    document = of_value(drawn, json.loads(content))
    holder, place = _place(drawn, document)
    if place is None or drawn.random() > 0.03:
        return json.dumps(document).encode()
    holder[place] = MARK
    return json.dumps(document).replace(f'"{MARK}"', drawn.choice(DEEP_TEXTS)).encode()


def of_toml(drawn: Random, content: bytes) -> bytes:
    """Settings with a line of another value, doubled or gone."""
    if drawn.random() < 0.3:
        return of_bytes(drawn, content)
    lines = content.decode().splitlines()
    for _ in range(drawn.randint(1, 3)):
        at = drawn.randrange(len(lines))
        key = lines[at].partition("=")[0]
        kind = drawn.randrange(5)
        if kind == 0:
            lines.insert(drawn.randrange(len(lines)), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = f"{key}= {drawn.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()


TOML_VALUES = (
    "0", "-1", "1e308", "nan", "inf", "true", '""', '"x"', "[]", "{}", "[1, 2]", "{a = 1}", "1979-05-27", "9" * 400,
    "9" * 5000, '"' + "x" * 9000 + '"', "[" * 2000 + "]" * 2000, '"../.."', "'\\'", "0x7fffffffffffffffff",
    "{a.b.c = []}",
)  # fmt: skip


def of_safetensors(drawn: Random, content: bytes) -> bytes:
    """A header of other values before the same data, or other bytes."""
    if drawn.random() < 0.4:
        return of_bytes(drawn, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = of_json(drawn, content[8 : 8 + length])
    said = len(header) if drawn.random() < 0.9 else drawn.choice((0, 1, len(header) - 1, 2**32, 2**63))
    return struct.pack("<Q", max(0, said)) + header + content[8 + length :]


def of_zip(drawn: Random, content: bytes) -> bytes:
    """One member altered under a checksum that is right, or other bytes."""
    if drawn.random() < 0.4:
        return of_bytes(drawn, content)
    altered = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(altered, "w") as target:
        chosen = drawn.choice(source.namelist())
        for name in source.namelist():
            data = source.read(name)
            if name == chosen and drawn.random() < 0.1:
                continue
            target.writestr(name, of_bytes(drawn, data) if name == chosen else data)
    return altered.getvalue()


def _place(drawn: Random, document: Any) -> tuple[Any, Any]:
    """A random place, at random depth; (document, None) where there is none."""
    holder, place = document, None
    while isinstance(document, dict | list) and document:
        holder = document
        place = drawn.choice(list(holder)) if isinstance(holder, dict) else drawn.randrange(len(holder))
        document = holder[place]
        if drawn.random() < 0.3:
            break
    return holder, place
