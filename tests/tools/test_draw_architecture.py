from itertools import pairwise
from xml.etree import ElementTree

import pytest
from draw_architecture import BOX, PICTURE, Layout, draw, ranks, rooms, without_shortcuts

GRAPH = {
    "top": frozenset({"left", "right", "bottom"}),
    "left": frozenset({"bottom", "aside"}),
    "right": frozenset({"middle"}),
    "middle": frozenset({"bottom"}),
    "bottom": frozenset(),
    "aside": frozenset(),
    "alone": frozenset(),
}


def test_the_committed_picture_is_todays() -> None:
    assert PICTURE.read_text("utf-8") == draw(), "the imports have changed; run python tools/draw_architecture.py"


def test_the_picture_is_well_formed_and_names_every_room() -> None:
    texts = {item.text for item in ElementTree.fromstring(draw()).iter("{http://www.w3.org/2000/svg}text")}

    assert set(rooms()) <= texts
    assert not {"__init__", "__main__"} & texts


def test_doors_and_former_names_are_no_rooms() -> None:
    found = rooms()

    assert {"cli", "compiler", "passes", "runtime", "errors"} <= set(found)
    assert not {"__init__", "__main__", "testing", "drop_in"} & set(found)
    assert (found["ptq"].kind, found["passes"].kind, found["recipe"].kind) == ("torch", "onnx", "plain")


def test_only_edges_that_no_path_replaces_are_drawn() -> None:
    found = without_shortcuts(GRAPH)

    assert found["top"] == {"left", "right"}
    assert found["left"] == {"bottom", "aside"}


def test_a_circle_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"circle: (a -> b -> a|b -> a -> b)"):
        without_shortcuts({"a": frozenset({"b"}), "b": frozenset({"a"})})


def test_a_room_stands_above_what_it_imports_and_a_leaf_right_below_its_readers() -> None:
    rank = ranks(GRAPH)

    assert all(rank[name] > rank[other] for name, inner in GRAPH.items() for other in inner)
    assert rank["aside"] == rank["left"] - 1


def test_nothing_in_a_row_overlaps() -> None:
    layout = Layout.of(without_shortcuts(GRAPH))
    layout.untangle()

    x = layout.centres()

    for row in layout.rows:
        places = [x[name] for name in row if name in GRAPH]
        assert all(right - left > BOX for left, right in pairwise(places))
    assert {name for row in layout.rows for name in row} >= set(GRAPH)


def test_rows_are_untangled() -> None:
    graph = {"a": frozenset({"z"}), "b": frozenset({"y"}), "y": frozenset(), "z": frozenset()}
    layout = Layout.of(graph)
    before = layout.crossings()

    layout.untangle()

    assert (before, layout.crossings()) == (1, 0)
