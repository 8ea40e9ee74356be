"""One page that tells a report: HTML with everything in it, made from ``report.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..checkpoint.atomic import write_text
from .page_kinds import conversion_page, healing_page, verification_page
from .page_parts import Page
from .page_sweep import sweep_page

HTML_NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_KINDS: dict[str, Callable[[Mapping[str, Any]], Page]] = {
    "conversion": conversion_page,
    "verification": verification_page,
    "healing": healing_page,
    "sweep": sweep_page,
}


def write_page(report: Mapping[str, Any], folder: Path) -> None:
    """Writes ``report.html``, which loads nothing from anywhere.

    Args:
        report: plain values, as in ``report.json``; its ``kind`` says which.
        folder: that the page goes into.
    """
    write_text(folder / HTML_NAME, render(report))


def render(report: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = _KINDS[report["kind"]](report)
    return environment.get_template("report.html").render(page=page, version=report["versions"].get("modeling-mla"))
