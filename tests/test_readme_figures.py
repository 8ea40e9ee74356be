"""No figure of a README can drift from the file of results that it comes from."""

from __future__ import annotations

import json
import re

import pytest
from jinja2 import UndefinedError
from readme_figures import HERE, READMES, ROOT, environment, only, percent, short, with_figures

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
SETTINGS = (
    "Transformers 5.23+ (tested with 5.23 and 5.24), PyTorch 2.11+",
    " (5 GB) is that of the files",
    "the same over 4,096 tokens",
    "more than 2% farther",
    "Kimi K2.6 at 262,144 tokens",
)
"""What is chosen and not measured may stand in prose."""
_UNITS = r"%|x\b| ?times| (?:ms|s|seconds|minutes|[KMGT]i?B|bytes|microseconds|nats|TB/s|TFLOP/s|tokens)\b"
_FIGURE = re.compile(rf"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?:{_UNITS})|(?<![\w.-])\d+\.\d+(?![\w.+])")
_NO_PROSE = re.compile(r"<!-- figures: \w+ -->\n.*?\n<!-- end -->|```.*?```|`[^`\n]*`|\]\([^)]*\)", re.DOTALL)


def test_readmes_say_what_the_results_say() -> None:
    templates = environment()
    assert {name: with_figures(text, templates) for name, text in TEXTS.items()} == TEXTS


def test_a_figure_that_was_changed_by_hand_is_found() -> None:
    templates, before = environment(), TEXTS["examples/benchmarks/README.md"]
    changed = before.replace("| 100% | 192 + 192 | 24.01 |", "| 100% | 192 + 192 | 23.01 |")
    assert changed != before
    assert with_figures(changed, templates) == before


@pytest.mark.parametrize("name", READMES)
def test_figures_stand_nowhere_else(name: str) -> None:
    prose = _NO_PROSE.sub("", TEXTS[name])
    for setting in SETTINGS:
        prose = prose.replace(setting, "")
    assert [prose[max(found.start() - 30, 0) : found.end()] for found in _FIGURE.finditer(prose)] == []


def test_templates_and_recorded_figures_are_all_used() -> None:
    templates = {file.stem: file.read_text(encoding="utf-8") for file in (HERE / "readme").glob("*.md")}
    marked = re.findall(r"<!-- figures: (\w+) -->", "".join(TEXTS.values()))
    assert sorted(marked) == sorted(templates)
    recorded = json.loads((HERE / "results" / "recorded.json").read_text(encoding="utf-8"))
    for name, entry in recorded.items():
        assert any(f"recorded.{name}" in template for template in templates.values()), name
        assert entry.keys() == {"machine", "versions", "command", "values"}, name


def test_a_figure_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        environment().from_string("{{ recorded.healing.perplexity }}").render()
    with pytest.raises(LookupError, match="2 rows have"):
        only([{"a": 1}, {"a": 1}], a=1)


def test_figures_are_shortened_without_losing_whole_digits() -> None:
    shown = [short(number) for number in (0.0664, 5.355, 14.335, 109.614, 2265.301, 1179.937, 0)]
    assert shown == ["0.0664", "5.36", "14.3", "110", "2,265", "1,180", "0.00"]
    assert (percent(0.309814), percent(0.0043, 1)) == ("31%", "0.4%")
