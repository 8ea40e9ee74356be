"""The picture of a sweep: what is lost over what is kept, the source's own cache in few bits beside it."""

from __future__ import annotations

from pathlib import Path

from ..reporting.page_sweep import ways_of
from ..reporting.picture_style import picture, save_png
from ..reporting.quality_chart import draw_quality
from .result import SweepResult


def draw_sweep(found: SweepResult, file: Path) -> None:
    """Draws the perplexity, in times the source's, over the bytes of the cache, as a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    with picture(620, 400) as figure:
        axes = figure.subplots()
        draw_quality(axes, ways_of(found.as_json()))
        axes.set_title(f"{found.source.name} by the bytes of its cache", loc="left")
        save_png(figure, file)
