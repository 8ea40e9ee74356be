"""The pages in a browser: nothing fails, the keyboard does everything, and axe-core finds no serious fault.

It takes Chromium, and the packages playwright and axe-playwright-python; `make report-check` installs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_cases import ALL
from report_pictures import WIDTHS, launch

from conversion.reporting.page import HTML_NAME, write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make report-check")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make report-check")

KINDS = ("conversion", "verification", "healing", "sweep", "conversion not run whole")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in KINDS:
        folder = tmp_path_factory.mktemp("page")
        write_page(ALL[name], folder)
        made[name] = folder / HTML_NAME
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        found = launch(running)
        if found is None:
            pytest.skip("no Chromium is installed; make report-check installs one")
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Any]:
    pages, failures = [], []

    def open_page(name: str, width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: failures.append(message.text))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("request", lambda request: failures.append(request.url) if request.url[:5] != "file:" else None)
        page.goto(files[name].as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert failures == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_axe_finds_no_serious_fault(opened: Any, name: str, width: int, scheme: str) -> None:
    page = opened(name, width, scheme)
    for folded in page.locator("summary").all():
        folded.click()
    found = axe.Axe().run(page).response["violations"]
    told = {
        fault["id"]: fault["nodes"][0]["html"][:200] for fault in found if fault["impact"] in ("serious", "critical")
    }
    assert told == {}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_it_fits_and_every_chart_is_seen(opened: Any, name: str, width: int) -> None:
    page = opened(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [chart.bounding_box() for chart in page.locator("figure svg").all()]
    assert boxes
    for box in boxes:
        assert box["width"] > 300
        assert box["height"] > 100
        assert box["x"] + box["width"] <= width


def test_dark_is_dark(opened: Any) -> None:
    def brightness(selector: str, name: str, scheme: str) -> float:
        colour = (
            opened("conversion", scheme=scheme)
            .locator(selector)
            .first.evaluate(f"element => getComputedStyle(element).{name}")
        )
        return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3

    assert brightness("body", "backgroundColor", "light") > 200 > 60 > brightness("body", "backgroundColor", "dark")
    assert brightness("figure svg text", "fill", "light") < 130 < brightness("figure svg text", "fill", "dark")


def test_the_slider_moves_by_keys(opened: Any) -> None:
    page = opened("conversion")
    slider, first = page.locator("#context"), page.locator(".slider li .bytes").first
    assert (slider.get_attribute("aria-valuetext"), first.inner_text()) == ("32,768 tokens", "32.8 MB")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert (slider.get_attribute("aria-valuetext"), first.inner_text()) == ("65,536 tokens", "65.5 MB")
    assert page.locator(".slider output").inner_text() == "65,536"
    page.keyboard.press("End")
    assert first.inner_text() == "1.0 GB"
    page.keyboard.press("Home")
    assert page.locator(".slider li .bytes").all_inner_texts() == ["1.0 MB", "256.0 kB"]
    bars = [bar.bounding_box()["width"] for bar in page.locator(".bar span").all()]
    assert bars[1] / bars[0] == pytest.approx(0.25, abs=0.01)


def test_tables_are_sorted_by_keys(opened: Any) -> None:
    page = opened("conversion")
    table = page.locator("table.sortable").first
    kl = table.locator("thead th", has_text="KL")
    column = [header.strip() for header in table.locator("thead th").all_inner_texts()].index(kl.inner_text().strip())
    cells = f"tbody tr > :nth-child({column + 1})"
    kl.locator("button").focus()
    page.keyboard.press("Enter")
    assert kl.get_attribute("aria-sort") == "ascending"
    assert table.locator(cells).all_inner_texts() == ["0.1000", "0.2000", "0.3000"]
    page.keyboard.press("Space")
    assert kl.get_attribute("aria-sort") == "descending"
    assert table.locator(cells).all_inner_texts() == ["0.3000", "0.2000", "0.1000"]
    assert page.evaluate("document.activeElement.textContent") == "KL"
    text = table.locator("thead th").first
    text.locator("button").click()
    assert (text.get_attribute("aria-sort"), kl.get_attribute("aria-sort")) == ("ascending", None)
    assert table.locator("tbody th").all_inner_texts()[0].startswith("held-out <chat>")


def test_numbers_are_sorted_as_numbers_and_gaps_come_last(opened: Any) -> None:
    page = opened("sweep")
    table = page.locator("#speed table.sortable")
    far = table.locator("thead th", has_text="128k")
    far.locator("button").click()
    assert table.locator("tbody tr > :last-child").all_inner_texts() == ["40.0", "-", "-", "-"]
    page = opened("conversion")
    page.locator("summary", has_text="Layer by layer").click()
    latent = page.locator("#layers thead button", has_text="latent").first
    latent.click()
    widths = list(map(int, page.locator("#layers tbody tr > :nth-child(2)").all_inner_texts()))
    assert widths == sorted(widths)


def test_every_stop_of_the_tab_key_is_seen(opened: Any) -> None:
    page = opened("healing")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        told = page.evaluate("[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]")
        if told[0] == "BODY":
            break
        reached.add(told[0])
        assert told[1] != "none", told
    assert {"A", "INPUT", "BUTTON", "SUMMARY", "PRE"} <= reached


def test_printing_shows_what_was_folded(opened: Any) -> None:
    page = opened("conversion")
    assert not page.locator("#layers table").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("#layers table").is_visible()
    assert not page.locator(".slider").is_visible()
