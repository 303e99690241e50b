"""The report's page in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser import chromium, prefer, requests, resize
from tests.reports import make_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Chrome, str]]:
    """The browser and the address of a report's page."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    make_report().to_html(path)
    with chromium(folder / "profile") as chrome:
        yield chrome, path.as_uri()


def column(chrome: Chrome, table: str, place: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(r => r.cells[arguments[1]].textContent)"
    )
    return chrome.execute_script(script, table, place)


def test_no_error_and_no_request(page: tuple[Chrome, str]) -> None:
    chrome, address = page
    requests(chrome)
    chrome.get_log("browser")
    chrome.get(address)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chrome.title == "some-owner/some-model: quantcache report"
    assert [entry["message"] for entry in chrome.get_log("browser")] == []
    assert {url for url in requests(chrome) if not url.startswith("data:")} == {address}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_overflows(page: tuple[Chrome, str], width: int, scheme: str) -> None:
    chrome, address = page
    prefer(chrome, scheme)
    resize(chrome, width)
    chrome.get(address)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    script = "const page = document.documentElement; return [innerWidth, page.scrollWidth <= page.clientWidth]"
    assert chrome.execute_script(script) == [width, True]
    script = """return [...document.querySelectorAll('h1, h2, p, li, figure, svg, .card, .scroll, footer')]
      .filter(e => e.getBoundingClientRect().right > window.innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert chrome.execute_script(script) == []
    # Readable: body text of at least 13 pixels, and chart letters that do not shrink below 10.
    script = """const svg = document.querySelector('svg');
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return [...document.querySelectorAll('p, td, li, .tick')].filter(e => e.checkVisibility()).map(
        e => parseFloat(getComputedStyle(e).fontSize) * (e.closest('svg') ? scale : 1))"""
    assert min(chrome.execute_script(script)) >= 10


def test_dark_follows_the_reader(page: tuple[Chrome, str]) -> None:
    chrome, address = page
    chrome.get(address)
    ratios = {}
    for scheme in ("light", "dark"):
        prefer(chrome, scheme)
        script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        text, ground = (luminance(color) for color in chrome.execute_script(script))
        ratios[scheme] = (text + 0.05) / (ground + 0.05)
    assert ratios["dark"] > 7  # contrast of WCAG's highest level
    assert ratios["light"] < 1 / 7


def luminance(color: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_tables_sort_by_mouse_and_keyboard(page: tuple[Chrome, str]) -> None:
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    chrome, address = page
    resize(chrome, 1400)
    chrome.get(address)
    chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    heads = chrome.find_elements(By.CSS_SELECTOR, "#heads th")
    names = [head.text for head in heads]
    gamma = names.index("γ")
    before = column(chrome, "heads", gamma)
    assert {head.get_attribute("aria-sort") for head in heads} == {"none"}
    button = heads[gamma].find_element(By.TAG_NAME, "button")
    button.click()
    assert heads[gamma].get_attribute("aria-sort") == "ascending"
    found = [float(text) for text in column(chrome, "heads", gamma)]
    assert found == sorted(map(float, before))
    assert found != [float(text) for text in before]
    button.send_keys(Keys.ENTER)
    assert heads[gamma].get_attribute("aria-sort") == "descending"
    assert [float(text) for text in column(chrome, "heads", gamma)] == found[::-1]
    target, head = names.index("target"), names.index("head")
    heads[target].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert [each.get_attribute("aria-sort") for each in (heads[gamma], heads[target])] == ["none", "ascending"]
    labels = [label.removesuffix(" ~") for label in column(chrome, "heads", target)]
    assert labels == sorted(labels)
    # Rows without a head go last, whichever way.
    for _ in range(2):
        heads[head].find_element(By.TAG_NAME, "button").click()
        numbers = column(chrome, "heads", head)
        assert numbers.index("–") == len(numbers) - numbers.count("–")
