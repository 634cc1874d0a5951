"""Dataclasses from parsed JSON: what fits is built, what does not is named."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq_export.recipe.plain import build


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    share: float
    kind: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...] = ()
    pair: tuple[str, int] = ("", 0)
    table: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    maybe: Inner | None = None
    values: tuple[int, ...] | tuple[float, ...] = ()
    on: bool = False


inners = st.builds(Inner, st.text(), st.lists(st.integers()).map(tuple))
outers = st.builds(
    Outer,
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["a", "b"]),
    inners,
    st.lists(inners, max_size=3).map(tuple),
    st.tuples(st.text(), st.integers()),
    st.dictionaries(st.text(), st.tuples(st.integers(), st.integers()), max_size=3),
    st.none() | inners,
    st.lists(st.integers(), max_size=3).map(tuple) | st.lists(st.floats(0.25, 9), min_size=1, max_size=3).map(tuple),
    st.booleans(),
)


@given(outers)
def test_what_was_written_is_read_back(value: Outer) -> None:
    assert build(Outer, json.loads(json.dumps(asdict(value)))) == value


GOOD = {"share": 1, "kind": "a", "inner": {"name": "x"}}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"share": True}, "share: got True"),
        ({"share": "1"}, "share: got '1'"),
        ({"kind": "c"}, "kind: got 'c'"),
        ({"inner": []}, r"inner: expected an object, got \[\]"),
        ({"inner": {}}, "inner.name: missing"),
        ({"inner": {"name": "x", "size": 1}}, "inner.size: unknown"),
        ({"many": {}}, "many: expected a list"),
        ({"many": [{"name": "x"}, {"name": 1}]}, r"many\[1\].name: got 1"),
        ({"pair": ["x"]}, "pair: expected 2 values, got 1"),
        ({"table": {"k": [1, 2.5]}}, r"table.k\[1\]: got 2.5"),
        ({"maybe": 3}, "maybe: expected an object"),
        ({"values": [1, "2"]}, r"values\[1\]: got '2'"),
        ({"on": 1}, "on: got 1"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], where: str) -> None:
    with pytest.raises(ValueError, match=f"^{where}"):
        build(Outer, {**GOOD, **changes})
