"""Draw the rooms of the source and who imports whom, read off the imports: docs/architecture.svg.

    python tools/draw_architecture.py

A room stands above all that it imports. An arrow that follows from others is left out: where a imports b and b imports
c, an arrow from a to c would say nothing new. A module that no room imports is a door (``__main__``) or a former name,
and no room. A test holds the committed picture to what this draws from today's source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from html import escape
from itertools import pairwise
from math import fsum  # the same bits in every version of Python
from pathlib import Path

from read_imports import ROOT, imports_of, part, parts_of, sources, third_party

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"
Graph = Mapping[str, frozenset[str]]
Edge = tuple[str, str]

BOX, LANE, GAP = 112, 14, 22
"""Widths: of a room, of an arrow that passes a row, and between two of either."""
HEIGHT, ROW, MARGIN = 34, 84, 24
PORT = 16  # between two arrows at one edge of a room
SWEEPS = 24  # for the order of the rows
SETTLING = 300  # for the places in them
# Boxes bring their own ground, and the grey of lines and legend is readable on white and on black.
GREY, INK = "#7d8590", "#1f2328"
KINDS = {
    "torch": ("#ffd0b5", "imports torch"),
    "onnx": ("#b9d9ff", "imports onnx or an engine, never torch"),
    "plain": ("#e8e3c8", "imports neither"),
}
ENGINES = frozenset(
    {"onnx", "onnx_graphsurgeon", "onnxruntime", "onnxruntime_qnn", "openvino", "tensorrt", "tensorrt_rtx"}
)


@dataclass(frozen=True)
class Room:
    """A folder of the source, or a module that others import.

    Attributes:
        imports: Other rooms, whole paths of them left in.
        kind: A key of ``KINDS``.
    """

    imports: frozenset[str]
    kind: str


def rooms() -> dict[str, Room]:
    """Every room, by name."""
    names: dict[str, set[str]] = {}
    for path in sources():
        names.setdefault(part(path), set()).update(imports_of(path))
    inner = {name: parts_of(found) - {name} for name, found in names.items()}
    read = frozenset().union(*inner.values())
    kept = sorted(name for name in names if (ROOT / name).is_dir() or name in read)
    return {name: Room(frozenset(inner[name]), _kind(third_party(names[name]))) for name in kept}


def _kind(packages: set[str]) -> str:
    if "torch" in packages:
        return "torch"
    return "onnx" if packages & ENGINES else "plain"


def without_shortcuts(graph: Graph) -> dict[str, frozenset[str]]:
    """The same graph less each edge that a longer path replaces; refuses a circle."""
    below: dict[str, frozenset[str]] = {}
    try:
        for name in TopologicalSorter(graph).static_order():
            below[name] = graph[name].union(*(below[other] for other in graph[name]))
    except CycleError as error:
        raise SystemExit(f"rooms import each other in a circle: {' -> '.join(reversed(error.args[1]))}") from None
    return {
        name: frozenset(x for x in found if not any(x in below[other] for other in found - {x}))
        for name, found in graph.items()
    }


def ranks(graph: Graph) -> dict[str, int]:
    """Row of each room, 0 at the bottom: above all it imports; one that imports nothing right below its readers."""

    @cache
    def longest(name: str) -> int:
        return 1 + max((longest(other) for other in graph[name]), default=-1)

    found = {name: longest(name) for name in graph}
    for name in graph:
        readers = [found[other] for other, inner in graph.items() if name in inner]
        if not graph[name] and readers:
            found[name] = min(readers) - 1
    return found


@dataclass
class Layout:
    """Rows from the top, with a lane in every row that an arrow passes.

    Attributes:
        rows: Names of rooms and lanes, from left to right.
        links: Pairs of neighbours in adjacent rows, upper one first.
        lanes: Lanes of each arrow, from the top.
    """

    rows: list[list[str]]
    links: set[Edge]
    lanes: dict[Edge, list[str]]

    @classmethod
    def of(cls, graph: Graph) -> "Layout":
        """Every room in its row, in the order of names."""
        rank = ranks(graph)
        highest = max(rank.values())
        layout = cls([sorted(x for x in graph if rank[x] == highest - row) for row in range(highest + 1)], set(), {})
        for upper in sorted(graph):
            for lower in sorted(graph[upper]):
                between = range(rank[upper] - 1, rank[lower], -1)
                lanes = [f"{upper}>{lower}>{level}" for level in between]
                for level, lane in zip(between, lanes, strict=True):
                    layout.rows[highest - level].append(lane)
                way = [upper, *lanes, lower]
                layout.links.update(pairwise(way))
                layout.lanes[upper, lower] = lanes
        return layout

    def neighbours(self, name: str, row: int) -> list[str]:
        """Those of one item in the row above or below it."""
        there = set(self.rows[row])
        return [a if b == name else b for a, b in sorted(self.links) if name in (a, b) and (a in there or b in there)]

    def crossings(self) -> int:
        """How often two links cross."""
        at = {name: position for row in self.rows for position, name in enumerate(row)}
        count = 0
        for upper in self.rows[:-1]:
            links = sorted((at[a], at[b]) for a, b in self.links if a in upper)
            count += sum(b > d for i, (a, b) in enumerate(links) for c, d in links[i + 1 :] if a < c)
        return count

    def untangle(self) -> None:
        """Order the rows: by the mean place of neighbours, then by swaps, as long as that saves crossings."""
        best = [list(row) for row in self.rows]
        fewest = self.crossings()
        for sweep in range(SWEEPS):
            order = range(1, len(self.rows)) if sweep % 2 == 0 else range(len(self.rows) - 2, -1, -1)
            for row in order:
                self._sort(row, row - 1 if sweep % 2 == 0 else row + 1)
            self._swap()
            if self.crossings() < fewest:
                best, fewest = [list(row) for row in self.rows], self.crossings()
        self.rows = best

    def _sort(self, row: int, fixed: int) -> None:
        place = {name: position for position, name in enumerate(self.rows[fixed])}

        def wanted(position: int, name: str) -> float:
            found = [place[x] for x in self.neighbours(name, fixed)]
            return fsum(found) / len(found) if found else float(position)

        ordered = sorted(enumerate(self.rows[row]), key=lambda item: (wanted(*item), item[0]))
        self.rows[row] = [name for _, name in ordered]

    def _swap(self) -> None:
        for row in self.rows:
            for left in range(len(row) - 1):
                before = self.crossings()
                row[left], row[left + 1] = row[left + 1], row[left]
                if self.crossings() >= before:
                    row[left], row[left + 1] = row[left + 1], row[left]

    def centres(self) -> dict[str, float]:
        """x of every item: as near to its neighbours as the items beside it allow."""
        x = {name: 0.0 for row in self.rows for name in row}
        for row in self.rows:
            x.update(zip(row, _packed(row, [0.0] * len(row), [1] * len(row)), strict=True))
        near: dict[str, list[str]] = {name: [] for name in x}
        for upper, lower in sorted(self.links):
            near[upper].append(lower)
            near[lower].append(upper)
        for name, found in near.items():
            if not found:
                found.append(name)  # stays where it is
        for sweep in range(SETTLING):
            for row in self.rows if sweep % 2 == 0 else reversed(self.rows):
                means = [fsum(x[other] for other in near[name]) / len(near[name]) for name in row]
                x.update(zip(row, _packed(row, means, [len(near[name]) for name in row]), strict=True))
        return x

    def arrows(self, at: Mapping[str, tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Middles of what each arrow passes, its ends apart from those of others at the same edge of a room."""
        ways = {edge: [edge[0], *lanes, edge[1]] for edge, lanes in sorted(self.lanes.items())}
        points = {edge: [at[name] for name in way] for edge, way in ways.items()}
        for end, beside in ((0, 1), (-1, -2)):
            for name in at:
                mine = sorted((at[way[beside]], edge) for edge, way in ways.items() if way[end] == name)
                for number, (_, edge) in enumerate(mine):
                    x, y = at[name]
                    points[edge][end] = (x + PORT * (2 * number - len(mine) + 1) // 2, y)
        return list(points.values())


def _width(name: str) -> int:
    return LANE if ">" in name else BOX


def _packed(row: Sequence[str], wanted: Sequence[float], weights: Sequence[int]) -> list[float]:
    """Places in this order, apart by their widths, with the least weighted squared distance from those wanted."""
    start = [0.0]
    for left, right in pairwise(row):
        start.append(start[-1] + (_width(left) + _width(right)) / 2 + GAP)
    blocks: list[tuple[float, int, int]] = []  # mean, weight and count of items that lie side by side
    for value, offset, weight in zip(wanted, start, weights, strict=True):
        mean, total, count = value - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, more, items = blocks.pop()
            mean = (mean * total + other * more) / (total + more)
            total, count = total + more, count + items
        blocks.append((mean, total, count))
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, start, strict=True)]


def draw() -> str:
    """The picture, as SVG."""
    found = rooms()
    graph = without_shortcuts({name: room.imports for name, room in found.items()})
    layout = Layout.of(graph)
    layout.untangle()
    x = layout.centres()
    left = min(x[name] - _width(name) / 2 for name in x) - MARGIN
    at = {
        name: (round(x[name] - left), MARGIN + ROW * number + HEIGHT // 2)
        for number, row in enumerate(layout.rows)
        for name in row
    }
    width = max(place + _width(name) // 2 for name, (place, _) in at.items()) + MARGIN
    bottom = MARGIN + ROW * (len(layout.rows) - 1) + HEIGHT
    arrows = [_arrow(points) for points in layout.arrows(at)]
    boxes = [_box(name, at[name], found[name].kind) for name in sorted(found)]
    legend = [_legend(MARGIN, bottom + 34 + 24 * row, *kind) for row, kind in enumerate(KINDS.values())]
    height = bottom + 34 + 24 * len(KINDS) + MARGIN // 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="ui-sans-serif, system-ui, sans-serif" font-size="14">',
            "<title>The rooms of tfmq-export and what they import</title>",
            "<!-- Drawn by tools/draw_architecture.py from the imports in the source. -->",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{GREY}"/></marker></defs>',
            *arrows,
            *boxes,
            *legend,
            "</svg>",
            "",
        ]
    )


def _arrow(points: Sequence[tuple[int, int]]) -> str:
    """A curve from the lower edge of a box through its lanes to the upper edge of another."""
    (x, y), *_, (last_x, last_y) = points
    way = [(x, y + HEIGHT // 2)]
    for lane_x, lane_y in points[1:-1]:
        way += [(lane_x, lane_y - HEIGHT // 2), (lane_x, lane_y + HEIGHT // 2)]
    way.append((last_x, last_y - HEIGHT // 2))
    path = f"M{way[0][0]} {way[0][1]}"
    for start, end in zip(way[::2], way[1::2], strict=True):
        middle = (start[1] + end[1]) // 2
        path += f"C{start[0]} {middle} {end[0]} {middle} {end[0]} {end[1]}"
        if end != way[-1]:
            path += f"V{end[1] + HEIGHT}"
    return f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="1.4" marker-end="url(#arrow)"/>'


def _box(name: str, at: tuple[int, int], kind: str) -> str:
    x, y = at
    return (
        f'<rect x="{x - BOX // 2}" y="{y - HEIGHT // 2}" width="{BOX}" height="{HEIGHT}" rx="6" '
        f'fill="{KINDS[kind][0]}" stroke="{GREY}"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="{INK}">{escape(name)}</text>'
    )


def _legend(x: int, y: int, colour: str, text: str) -> str:
    return (
        f'<rect x="{x}" y="{y - 12}" width="22" height="14" rx="3" fill="{colour}" stroke="{GREY}"/>'
        f'<text x="{x + 30}" y="{y}" fill="{GREY}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
    print(f"written: {PICTURE}")
