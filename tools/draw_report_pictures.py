"""The pictures of docs/report.md: bundles' pages in Chromium, as a reader sees them.

    python tools/draw_report_pictures.py OUT/emoji32-w8a8 OUT/emoji32-cond-w8a8 comparison.html [-o docs/images]

The first bundle gives the top of a page, its timesteps in dark colours and a layer that was opened; the second, which
is guided, its top and its guidance. Needs Chromium and chromedriver (Debian: chromium, chromium-driver).
"""

import argparse
import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "force-prefers-reduced-motion")


@dataclass(frozen=True, slots=True)
class View:
    """What one picture shows.

    Attributes:
        page: Which of the pages that were given.
        section: Its id; the top of the page if empty.
        opened: CSS selector of what is clicked first.
    """

    name: str
    page: int
    width: int
    height: int
    section: str = ""
    opened: str = ""
    dark: bool = False


VIEWS = (
    View("report", 0, 1200, 1040),
    View("report-timesteps", 0, 1200, 900, "timesteps", dark=True),
    View("report-layers", 0, 1200, 820, "layers", "#layer-table tbody tr:nth-child(12) a"),
    View("report-cond", 1, 1160, 1080),
    View("report-guidance", 1, 1280, 590, "guidance"),
    View("report-comparison", 2, 1200, 1420),
)


def main() -> None:
    """Open the pages, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="bundle")
    parser.add_argument("guided", type=Path, help="bundle with guidance")
    parser.add_argument("comparison", type=Path, help="page of tfmq-report with several bundles")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images"))
    asked = parser.parse_args()
    pages = [asked.first / "tfmq/report.html", asked.guided / "tfmq/report.html", asked.comparison]
    with browser() as window:
        for view in VIEWS:
            path = asked.output / f"{view.name}.png"
            path.write_bytes(drawn(window, pages[view.page].absolute(), view))
            print(path)


@contextmanager
def browser() -> Iterator[Any]:
    """A window of Chromium that nobody sees, and that keeps what pages complain of."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield window
    finally:
        window.quit()


def open_page(window: Any, page: Path, width: int, height: int, **media: str) -> None:
    """Open a page anew.

    Args:
        media: What the reader prefers, as CSS asks for it: ``prefers_color_scheme="dark"``.
    """
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    window.get("about:blank")
    window.get(page.as_uri())


def drawn(window: Any, page: Path, view: View) -> bytes:
    """A view as PNG."""
    window.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    open_page(window, page, view.width, view.height, prefers_color_scheme="dark" if view.dark else "light")
    if view.opened:
        window.execute_script("document.querySelector(arguments[0]).click()", view.opened)
    if view.section:
        window.execute_script("document.getElementById(arguments[0]).scrollIntoView()", view.section)
    found = window.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(found["data"])


if __name__ == "__main__":
    main()
