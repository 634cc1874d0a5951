"""Reads a page as a browser would: what is shown, what is linked, and whether every tag is closed."""

from html.parser import HTMLParser

VOID = frozenset({"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"})
REFERENCES = frozenset({"src", "href", "xlink:href", "srcset", "action", "data"})


class PageReader(HTMLParser):
    """What a page holds.

    Attributes:
        ids: Of its elements, in order.
        links: Everything that refers to something else.
        rows: Text of the cells of every row, by the id of its table.
        text: All that is shown, styles and scripts left out.
        names: Of its elements that have a role or a label: what a screen reader says.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.names: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.ids += [given["id"]] if "id" in given else []
        self.names += [given["aria-label"]] if "aria-label" in given else []
        self.links += [value for name, value in given.items() if name in REFERENCES]
        if tag == "table":
            self._table = given.get("id", "")
        elif tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")
            self.text += " "
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[self._table][-1][-1] += data
