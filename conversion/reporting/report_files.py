"""The files of a report: plain values, and the page that is made from them alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import write_json
from .page import write_page

JSON_NAME = "report.json"
_PACKAGES = ("modeling-mla", "torch", "transformers", "safetensors")


def write_report_files(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.json`` and ``report.html``; ``report`` says its kind."""
    write_json(folder / JSON_NAME, report)
    write_page(report, folder)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a checkpoint's folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "kind" in found else None


def package_versions() -> dict[str, str]:
    """The packages that the figures of a report hang on, by their release."""
    return {name: version(name) for name in _PACKAGES}
