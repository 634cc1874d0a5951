"""Pages from the templates in ``page/``: one file each, style and script included."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from tfmq_export import __version__
from tfmq_export.report import numbers, sparklines


@cache
def templates() -> Environment:
    """In HTML every value is escaped; a name that is not given is an error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for each in (numbers.size, numbers.short, numbers.exact, numbers.many, numbers.seconds, numbers.decibels):
        found.filters[each.__name__] = each
    found.filters["bars"] = sparklines.bars
    found.filters["band"] = lambda ends: sparklines.band(*ends)
    return found


def render(template: str, **values: object) -> str:
    """A whole page.

    Args:
        template: File in ``page/``.
        values: What it shows, by name.
    """
    return templates().get_template(template).render(version=__version__, **values)
