"""Pictures of a report's page as a desk and a telephone show it; it takes Playwright and Chromium.

`make report-pictures` makes a sweep, and these of it.

    python examples/benchmarks/report_pictures.py out/report/report.html examples
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

WIDTHS = (1280, 390)
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_COLOURS = 256


def launch(playwright: Any) -> Any | None:
    """The Chromium that is installed, or else Playwright's own; None where there is neither."""
    installed = next(filter(None, map(shutil.which, _NAMES)), playwright.chromium.executable_path)
    if not Path(installed).exists():
        return None
    # As root, whom a container often has alone, Chromium has no sandbox.
    return playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])


def main(
    page: Annotated[Path, typer.Argument(help="The report.html.")],
    folder: Annotated[Path, typer.Argument(help="Of report-1280.png and report-390.png.")],
) -> None:
    """Takes the pictures; see the module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            raise typer.BadParameter("no Chromium is installed; make report-pictures installs one.")
        for width in WIDTHS:
            opened = browser.new_page(viewport={"width": width, "height": 900})
            opened.goto(page.resolve().as_uri())
            seen = Image.open(io.BytesIO(opened.screenshot(full_page=True))).convert("RGB")
            file = folder / f"report-{width}.png"
            seen.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
            typer.echo(f"{file}, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
