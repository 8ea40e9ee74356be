"""The picture of a sweep: what is lost over what is kept, the source's own cache in few bits beside it."""

from __future__ import annotations

from pathlib import Path

from .result import SweepResult


def draw_sweep(found: SweepResult, file: Path) -> None:
    """Draws the perplexity, in times the source's, over the bytes of the cache, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    base = found.source_figures.perplexity
    for name, rows in (("converted", found.sizes), ("source, its own cache in few bits", found.quantised_source)):
        places = sorted((100 * row.bytes_share, row.perplexity / base) for row in rows)
        if places:
            axes.plot(*zip(*places, strict=True), "o-", label=name)
    axes.set_xlabel("bytes of the cache, % of the source's")
    axes.set_ylabel("perplexity, times the source's")
    axes.legend()
    figure.savefig(file, format="png", dpi=150)
