"""Matplotlib's figures as SVG inside a page: small, in the page's own colours, light and dark.

A figure is drawn in ink that stands for a colour of the page (``INK``, ``MUTED``, ...), and these are exchanged in the
file. Text stays text, for screen readers and for the page's font.
"""

import io
import re
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names of folders and layers may have dollar signs
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"#([\w-]+)")
_FONT = re.compile(r"font-family:[^;]*")


def svg_of(figure: Figure, name: str, said: str) -> str:
    """A figure as an SVG element.

    Args:
        name: Unique on its page: its ids begin with it.
        said: What it shows, for those who do not see it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    for prefix, place in (("", _SVG), ("xlink", _XLINK)):
        ET.register_namespace(prefix, place)
    root = ET.fromstring(stream.getvalue())
    for child in list(root):
        # Its style would be the whole page's.
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    _rename(root, name)
    for element in root.iter():
        if "font" in element.get("style", ""):
            element.set("style", _FONT.sub("font-family: system-ui, sans-serif", element.attrib["style"]))
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": said, "class": "figure"}
    text = re.sub(r">\s+<", "><", ET.tostring(root, "unicode"))
    for ink, color in _COLORS.items():
        text = text.replace(ink, color)
    return text


def _rename(root: ET.Element, name: str) -> None:
    """Ids that nothing refers to go, the others get the figure's name in front: ids are unique on a page."""
    ids = {element.get("id") for element in root.iter()}
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            for found in _REFERENCE.findall(value):
                if found in ids:
                    used.add(found)
                    element.set(key, value.replace(f"#{found}", f"#{name}-{found}"))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
