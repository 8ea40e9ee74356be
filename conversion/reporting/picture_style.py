"""One look for every picture: colours that the colour-blind can tell apart, plain numbers, few lines.

The colours are those of Okabe and Ito (Color Universal Design, 2008), darkened where thin lines and letters in them
would be hard to read on white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, QUIET, PAPER = "#1c2024", "#6a7178", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0064a3", "#c04d00", "#00785a", "#a14d7f", "#9a6b00", "#2a86c4"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Of lines beside each other, in this order. What was converted is the first, wherever there is such a thing."""
_POINTS = 72
"""An inch of matplotlib's."""
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 5.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "modeling-mla",
}


@contextmanager
def picture(width: int, height: int) -> Iterator[Figure]:
    """Gives an empty figure of so many points; what is drawn within has the style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width / _POINTS, height / _POINTS), layout="constrained")


def save_png(figure: Figure, file: Path) -> None:
    """Writes an opaque picture.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        figure.savefig(file, format="png", dpi=2 * _POINTS)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}; choose another file.") from error


def plain_ticks(axis: Axis, ticks: Sequence[float], unit: str = "") -> None:
    """Puts numbers as a reader would write them at ``ticks`` alone."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{plain(value)}{unit}")


def plain(value: float) -> str:
    """A number without an exponent or needless zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from ``low`` to ``high`` for a logarithmic axis; as many as are clear, and at most ``most``."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            step * 10**power for power in range(-12, 16) for step in steps if low <= step * 10**power * 1.0001 <= high
        ]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def laid_out(axes: Axes) -> None:
    """Gives the axes the place in their figure that they will have, so that pixels can be asked for."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()


def label_at_right(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 13) -> None:
    """Writes a name behind the end of every line, one above the other where they come close.

    Args:
        axes: with its limits set.
        ends: of each line: where it ends, in the units of the axes, its name, and its colour.
        gap: between two names, in points.
    """
    laid_out(axes)
    points_a_pixel = _POINTS / axes.figure.dpi
    heights = [float(axes.transData.transform((x, y))[1]) * points_a_pixel for x, y, *_ in ends]
    placed = _apart(heights, gap)
    for (x, y, name, colour), height, place in zip(ends, heights, placed, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(8, place - height),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """``heights`` moved as little as keeps them ``gap`` apart: those that touch are spread around their mean."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _spread(groups[-2], heights, gap)[-1] + gap > _spread(groups[-1], heights, gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(heights)
    for group in groups:
        for index, place in zip(group, _spread(group, heights, gap), strict=True):
            placed[index] = place
    return placed


def _spread(group: Sequence[int], heights: Sequence[float], gap: float) -> list[float]:
    middle = sum(heights[index] for index in group) / len(group)
    return [middle + gap * (place - (len(group) - 1) / 2) for place in range(len(group))]
