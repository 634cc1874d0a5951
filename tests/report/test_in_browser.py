"""The pages in Chromium: what moves, what the keyboard reaches, and that nothing complains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draw_report_pictures
import pytest
from standins.reported_bundle import reported_bundle

from tfmq_export.report.bundle_page import write_page
from tfmq_export.report.comparison import write_comparison
from tfmq_export.report.facts import Facts

pytestmark = pytest.mark.skipif(
    None in (draw_report_pictures.BROWSER, draw_report_pictures.DRIVER),
    reason="needs Chromium and chromedriver (Debian: chromium, chromium-driver)",
)
WIDE, NARROW = 1280, 390


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with draw_report_pictures.browser() as window:
        yield window


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    facts = []
    for name, psnr in (("one", 20.0), ("two", 30.0)):
        reported_bundle(folder / name, psnr=psnr, kept=(0.9, 0.97, 1.02, 0.95))
        facts.append(Facts.read(folder / name))
    write_comparison(facts, folder / "comparison.html")
    return {"bundle": write_page(facts[0]), "comparison": folder / "comparison.html"}


@pytest.fixture
def page(browser: Any, pages: dict[str, Path]) -> Any:
    """The bundle's page, freshly opened on a wide screen."""
    return opened(browser, pages["bundle"])


def opened(browser: Any, path: Path, width: int = WIDE, **media: str) -> Any:
    draw_report_pictures.open_page(browser, path, width, 900, **media)
    return browser


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        ActionChains(page).send_keys(getattr(Keys, key, key)).perform()


def focus(page: Any, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).focus()", selector)


def shown(page: Any, table: str) -> list[str]:
    """The first cell of each row that is not hidden."""
    rows = page.find_elements("css selector", f"#{table} tbody tr:not([hidden])")
    return [row.find_element("css selector", "td").text for row in rows]


@pytest.mark.parametrize("name", ["bundle", "comparison"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_complains_and_nothing_is_wider_than_the_screen(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    page = opened(browser, pages[name], width)

    assert page.get_log("browser") == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    unloaded = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert (
        page.execute_script(unloaded.replace("document.images", "document.querySelectorAll('img:not([loading])')")) == 0
    )


def test_the_slider_shows_another_state_by_mouse_and_by_key(page: Any) -> None:
    def frame() -> str:
        return str(page.execute_script("return document.getElementById('films').style.getPropertyValue('--frame')"))

    assert frame().strip() == "3"
    assert find(page, ".slider output").text == "the image that comes out"

    focus(page, "#step")
    press(page, "HOME", "ARROW_RIGHT")

    assert frame() == "1"
    assert find(page, ".slider output").text == "before call 3 of 4, timestep 250"
    assert find(page, "#step").get_attribute("aria-valuetext") == "before call 3 of 4, timestep 250"


def test_a_film_shows_exactly_one_frame(page: Any) -> None:
    seen = page.execute_script(
        "const film = document.querySelector('.film'), box = film.getBoundingClientRect();"
        "const final = film.querySelector('img:last-child').getBoundingClientRect();"
        "return [final.top - box.top, final.height - box.height]"
    )

    assert seen == pytest.approx([0, 0], abs=0.5)


def test_a_column_sorts_both_ways_from_the_keyboard(page: Any) -> None:
    focus(page, "#layer-table th:nth-child(5) button")

    press(page, "ENTER")
    largest = shown(page, "layer-table")
    press(page, "ENTER")

    assert largest[0] == "net.first"
    assert find(page, "#layer-table th:nth-child(5)").get_attribute("aria-sort") == "ascending"
    assert shown(page, "layer-table")[-1] == "net.first"


def test_words_filter_the_layers_and_their_number_is_told(page: Any) -> None:
    focus(page, "#layer-table-filter")
    press(page, "conv w4a8")

    assert shown(page, "layer-table") == ["net.<middle> & co"]
    assert find(page, ".tools output").text == "1 of 4"


def test_a_layer_opens_and_closes_from_the_keyboard_and_focus_comes_back(page: Any) -> None:
    focus(page, "#layer-table a[href='#layer-2']")
    assert not find(page, "#layer-2").is_displayed()

    press(page, "ENTER")
    opened_layer = find(page, "#layer-2").is_displayed()
    inside = page.execute_script("return document.activeElement.id")
    press(page, "ESCAPE")

    assert (opened_layer, inside) == (True, "layer-2")
    assert not find(page, "#layer-2").is_displayed()
    assert page.execute_script("return document.activeElement.getAttribute('href')") == "#layer-2"


def test_without_script_figures_and_images_are_there(browser: Any, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = opened(browser, pages["bundle"])

        assert find(page, "#films img").is_displayed()
        assert find(page, "#layer-table").is_displayed()
        assert not find(page, ".slider").is_displayed()
        assert not find(page, ".tools").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    page = opened(browser, pages["bundle"], prefers_color_scheme=scheme)

    for selector in ("h1", ".lead", ".tile .note", ".verdict strong", "nav.contents a", "td a"):
        assert contrast(page, selector) >= 4.5, selector  # WCAG 2, level AA


def test_paper_is_white_whatever_the_screen_is(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["bundle"], prefers_color_scheme="dark")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})

    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert ground == "rgb(255, 255, 255)"
    assert contrast(page, ".verdict p") >= 7
    assert not find(page, ".slider").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def contrast(page: Any, selector: str) -> float:
    """Of an element's text with the nearest ground behind it."""
    found = page.execute_script(
        "let at = document.querySelector(arguments[0]); const ink = getComputedStyle(at).color;"
        "while (getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)') at = at.parentElement;"
        "return [ink, getComputedStyle(at).backgroundColor].map(c => c.match(/[0-9.]+/g).slice(0, 3).map(Number))",
        selector,
    )
    light, dark = sorted((luminance(color) for color in found), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: list[float]) -> float:
    """Relative luminance of an sRGB color (WCAG 2)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (value / 255 for value in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
