"""The page of every kind of report: whole, of itself, and readable without eyes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import ALL, CONTEXTS, LAYERS, conversion, healing, memory, sweep, verification

from conversion.reporting.differences import marked
from conversion.reporting.page import HTML_NAME, render, write_page
from conversion.reporting.page_sweep import ways_of

VOID = {"meta", "input", "br", "link", "img"}


class Elements(HTMLParser):
    """All elements with their attributes, their text, and whether every one is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.found if found == tag]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render(report) for name, report in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_every_reference_has_its_target_and_every_id_is_its_own(pages: dict[str, str], name: str) -> None:
    elements = Elements(pages[name])
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set()
    for _, attributes in elements.found:
        for attribute, value in attributes.items():
            if attribute in ("aria-labelledby", "for"):
                wanted |= set(value.split())
            elif attribute in ("href", "xlink:href"):
                assert value.startswith("#")
                wanted.add(value[1:])
            wanted |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
    assert wanted <= set(ids)
    assert len(wanted) > 5


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_loaded_from_anywhere(pages: dict[str, str], name: str) -> None:
    elements = Elements(pages[name])
    assert not [attributes for _, attributes in elements.found if "src" in attributes]
    assert not elements.attributes("link")
    named = set(re.findall(r"[a-z]+://[^\"' )]+", pages[name]))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in pages[name]


@pytest.mark.parametrize("name", ALL)
def test_charts_are_told_in_words_and_wear_the_colours_of_the_page(pages: dict[str, str], name: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", pages[name], re.DOTALL)
    assert charts
    for chart in charts:
        title, description = (re.search(rf"<{tag}[^>]*>(.+?)</{tag}>", chart) for tag in ("title", "desc"))
        assert title is not None
        assert description is not None
        assert len(description[1]) > 20
        assert 'role="img"' in chart
        assert re.findall(r"#[0-9a-f]{6}\b", chart) == []
        assert "var(--" in chart


@pytest.mark.parametrize("name", ALL)
def test_no_value_is_shown_as_python_has_it(pages: dict[str, str], name: str) -> None:
    text = " ".join(Elements(pages[name]).text).replace("trust_remote_code=True", "")
    assert re.findall(r"\b(None|nan|inf|True|False)\b|[{}]|\['", text) == []


@pytest.mark.parametrize("name", ["conversion", "verification", "healing", "sweep"])
def test_what_others_wrote_is_text(name: str) -> None:
    report = json.loads(json.dumps(ALL[name]).replace("org/tiny", "<img src=x onerror=alert(1)>'\\\"&"))
    elements = Elements(render(report))
    assert not elements.attributes("img")
    assert len(elements.attributes("script")) == 1
    assert any("<img src=x onerror=alert(1)>'\"&" in text for text in elements.text)


def test_the_slider_tells_every_context() -> None:
    slider = next(attributes for _, attributes in Elements(render(conversion())).found if "data-memory" in attributes)
    told = json.loads(slider["data-memory"])
    assert told["contexts"] == [f"{tokens:,}" for tokens in CONTEXTS]
    assert {one["name"]: one["bytes"] for one in told["series"]} == {
        name: memory()[name] for name in ("source", "converted")
    }
    assert told["series"][1]["shown"][0] == "256.0 kB"


def test_rows_are_sorted_by_values_not_by_what_is_shown() -> None:
    elements = Elements(render(conversion()))
    values = [attributes["data-value"] for attributes in elements.attributes("td")]
    assert "12.5" in values
    assert all(value == "inf" or float(value) >= 0 for value in values)


def test_a_model_that_was_not_run_whole_says_so_and_shows_no_samples(pages: dict[str, str]) -> None:
    page = pages["conversion not run whole"]
    assert "it takes 9 GB of memory" in page
    assert "continued by both" not in page
    assert "continued by both" in pages["conversion"]


def test_a_healing_tells_of_the_conversion_before_it(pages: dict[str, str]) -> None:
    for name in ("healing", "verification"):
        assert "Layer by layer" in pages[name]
    assert pages["healing"].count('<th scope="row" data-value="0">0</th>') == 1
    assert "Layer by layer" not in pages["healing of an unknown checkpoint"]
    assert "were kept" in pages["healing that gained nothing"]


def test_a_dry_sweep_names_no_folder(pages: dict[str, str]) -> None:
    assert "mla chat 12.5%" in pages["sweep"]
    assert "mla heal 25% --teacher org/tiny" in pages["sweep"]
    assert "<code>mla heal out/25%</code> brings it nearer." in pages["sweep"]
    assert "mla chat" not in pages["dry sweep"]
    assert "mla convert org/tiny OUT --cache 25%" in pages["dry sweep"]
    assert "Speed of decoding" not in pages["dry sweep"]


def test_a_sweep_tells_how_sizes_are_kept_and_how_the_recommended_one_goes_on(pages: dict[str, str]) -> None:
    page = pages["sweep"]
    assert page.count(">25% in 4 + 6 bits<") == page.count(">At 25% in 4 + 6 bits<") == 1
    assert [(way.name, len(way.points)) for way in ways_of(sweep())] == [
        ("converted, in bfloat16", 1),
        ("converted, in few bits", 2),
        ("the source's own cache in few bits", 3),
    ]
    assert "continued by the source and at 25%" in page
    assert "upon a <mark>hill</mark>" in page
    assert "same prompts" not in pages["dry sweep"]


def test_commands_suit_the_layout() -> None:
    report = conversion()
    report["recipe"]["layout"] = "deepseek"
    assert "--to gguf" in render(report)
    assert "--to gguf" not in render(conversion())
    assert "--to vllm" in render(conversion())


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_page(sweep(), tmp_path / name)
    one, other = ((tmp_path / name / HTML_NAME).read_bytes() for name in ("one", "other"))
    assert one == other
    assert [path.name for path in (tmp_path / "one").iterdir()] == [HTML_NAME]


def test_many_domains_and_layers_are_all_drawn() -> None:
    report: dict[str, Any] = healing()
    names = [f"domain {place}" for place in range(9)]
    for field in ("before", "after"):
        report[field] = dict.fromkeys(names, 0.4)
    for look in report["looks"]:
        look["kl"] = dict.fromkeys(names, 0.2)
    page = render(report)
    assert all(f">{name}</text>" in page for name in names)
    report = conversion()
    report["layers"] *= 20
    report["verification"] = verification(layer_errors=[0.1] * 20 * LAYERS)
    assert f'data-value="{20 * LAYERS - 1}"' in render(report)


@given(st.text(alphabet="ab ,.\n"), st.text(alphabet="ab ,.\n"))
def test_marked_texts_are_the_texts(first: str, second: str) -> None:
    pieces = marked(first, second)
    assert tuple("".join(text for text, _ in side) for side in pieces) == (first, second)
    kept = ["".join(text for text, differs in side if not differs) for side in pieces]
    assert kept[0] == kept[1]
    if first == second:
        assert not any(differs for side in pieces for _, differs in side)


def test_differences_are_marked_by_the_word() -> None:
    source, converted = marked("the old man, and", "the young man, and")
    assert source == [("the ", False), ("old", True), (" man, and", False)]
    assert converted == [("the ", False), ("young", True), (" man, and", False)]
