"""Draws what `attention_kernels.py` measured: operations a second over operations a byte, under the two roofs.

python examples/benchmarks/kernels_picture.py examples/benchmarks/results/kernels-nvidia-h100-80gb-hbm3.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conversion.reporting.picture_style import (
    BLUE,
    GREEN,
    QUIET,
    VERMILLION,
    nice_ticks,
    picture,
    plain_ticks,
    save_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {16: BLUE, 8: VERMILLION, 4: GREEN}
_MARKERS = "os^Dv"


def draw_roofline(axes: Axes, result: dict[str, Any]) -> None:
    """Every row: its colour says the bits of a latent's value, its marker the backend."""
    rows, roofs = result["kernels"], result["roofs"]
    copy, product = roofs["copy_gb_s"] / 1e3, roofs["product_tflop_s"]
    intensities, rates = ([row[name] for row in rows] for name in ("flop_a_byte", "tflop_s"))
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(rates) / 1.5, max(*rates, min(high * copy, product)) * 2)
    bends = sorted({low, min(max(product / copy, low), high), high})
    axes.plot(bends, [min(x * copy, product) for x in bends], color=QUIET, linewidth=1.2, linestyle=":")
    told = f"what a copy of {copy:.3g} TB/s and a product of {product:.3g} TFLOP/s allow"
    axes.annotate(told, (high, min(high * copy, product)), ha="right", va="bottom", color=QUIET,
                  xytext=(0, 3), textcoords="offset points")  # fmt: skip
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for backend, marker in zip(backends, _MARKERS, strict=False):
        for bits in sorted({row["bits"] for row in rows}, reverse=True):
            own = [row for row in rows if (row["backend"], row["bits"]) == (backend, bits)]
            axes.plot(
                [row["flop_a_byte"] for row in own],
                [row["tflop_s"] for row in own],
                marker,
                color=_COLOURS.get(bits, QUIET),
                markerfacecolor=_COLOURS.get(bits, QUIET) if backend == backends[0] else "none",
                label=f"{backend}, {bits} bits",
            )
    plain_ticks(axes.xaxis, nice_ticks(low, high))
    plain_ticks(axes.yaxis, nice_ticks(*axes.get_ylim()))
    axes.set_xlabel("operations for a byte of the cache")
    axes.set_ylabel("TFLOP/s")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw(file: Path) -> Path:
    """Writes the picture of a file of results beside it."""
    result = json.loads(file.read_text(encoding="utf-8"))
    drawn = file.with_suffix(".png")
    with picture(760, 400) as figure:
        axes = figure.subplots()
        draw_roofline(axes, result)
        axes.set_title(f"Attention of one step, {result['card']}, {result['dtype']}", loc="left")
        save_png(figure, drawn)
    return drawn


def main(file: Annotated[Path, typer.Argument(help="A kernels-CARD.json; the picture goes beside it.")]) -> None:
    """Draws the picture; see the module."""
    typer.echo(draw(file))


if __name__ == "__main__":
    typer.run(main)
