"""Draws ``quality.png`` from every ``quality*.json`` in a folder: ours, peers, and the source's own cache in few bits.

python examples/benchmarks/quality_picture.py examples/benchmarks/results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from conversion.reporting.picture_style import picture, save_png
from conversion.reporting.quality_chart import Way, draw_quality

PICTURE = "quality.png"
_OURS = "attention_aware"
_NAMES = {(_OURS, None): "ours, values and bits", (_OURS, 16): "ours, values alone", ("transmla", 16): "TransMLA"}


def ways_of(results: list[dict[str, Any]]) -> list[Way]:
    """Every method, what it spends bytes on, and every form of the source's own cache; ours come first."""
    points: dict[tuple[str, int | None], list[tuple[float, float]]] = {}
    sources: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        source = result["perplexity_source"]
        for row in result["rows"]:
            # Rows that do not tell their bits are older than caches in few bits.
            key = (row["method"], row.get("asked_bits", 16))
            points.setdefault(key, []).append((row["cache_share"], row["perplexity"] / source))
        for row in result.get("quantised_source", ()):
            sources.setdefault(row["form"], []).append((row["cache_share"], row["perplexity"] / source))
    order = sorted(points, key=lambda key: (key[0] != _OURS, key[0], key[1] is not None))
    ways = [Way(_name(*key), tuple(points[key]), dashed=key[0] != _OURS) for key in order]
    forms = [Way(f"source in few bits, {form}", tuple(found), dashed=True) for form, found in sources.items()]
    return [*ways[:1], *forms, *ways[1:]]


def _name(method: str, bits: int | None) -> str:
    named = _NAMES.get((method, bits))
    if named is not None:
        return named
    return method if bits in (None, 16) else f"{method}, {bits} bits"


def draw(folder: Path) -> Path:
    """Writes the picture of all results in ``folder``, which are on one text."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("quality*.json"))]
    if not results:
        raise typer.BadParameter(f"{folder} has no quality*.json; measure one by quality.py.")
    read = {(result["settings"]["text"], result["settings"]["windows"]) for result in results}
    if len(read) > 1:
        raise typer.BadParameter(f"{folder} has results on several texts ({read}); keep those of one there.")
    ((text, windows),) = read
    model = min((Path(result["settings"]["model"]).name for result in results), key=len)
    with picture(620, 400) as figure:
        axes = figure.subplots()
        draw_quality(axes, ways_of(results))
        axes.set_title(f"{model}, {windows} windows of {text}, nothing trained", loc="left")
        save_png(figure, folder / PICTURE)
    return folder / PICTURE


def main(folder: Annotated[Path, typer.Argument(help="Where the results lie, and the picture goes.")]) -> None:
    """Draws the picture; see the module."""
    typer.echo(draw(folder))


if __name__ == "__main__":
    typer.run(main)
