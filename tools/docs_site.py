"""What the docs site takes from outside docs/: pages that lie at the root, and links that lead there.

mkdocs reads this as a hook (mkdocs.yml). The files stay where readers of the source look for them, and their links work
there: relative to the file. On the site a link to a page of the site leads to that page, and a link to a source file
becomes its text. A link to nothing stays as it is, so that ``mkdocs build --strict`` refuses it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE: Mapping[str, str] = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "license.txt": "LICENSE",
    "security.md": "SECURITY.md",
}
"""Files of the site by their place on it, and where they lie in the source."""

LINK = re.compile(r"(?P<code>```.*?```)|\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)", re.DOTALL)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for place, source in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Let the links of a page lead to where their files are on the site."""
    return with_site_links(markdown, page.file.src_uri)


def with_site_links(markdown: str, place: str) -> str:
    """The same page with links of the site.

    Args:
        place: Of the page on the site.
    """
    folder = dirname(OUTSIDE.get(place, f"docs/{place}"))
    on_site = {source: there for there, source in OUTSIDE.items()}

    def on_link(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        source = normpath(f"{folder}/{found['path']}" if folder else found["path"])
        there = on_site.get(source, source.removeprefix("docs/") if source.startswith("docs/") else None)
        if there is not None:
            return f"[{found['text']}]({relpath(there, dirname(place) or '.')}{found['anchor'] or ''})"
        return found["text"] if (ROOT / source).exists() else found[0]

    return LINK.sub(on_link, markdown)
