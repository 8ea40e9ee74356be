"""Names of lines where there is room for them: at an end if possible, over nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .picture_style import laid_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_DISTANCE = 7
"""Points between a line's point and its name."""
_CLEARANCE = 4
"""Points between a name and what else is drawn."""
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_ALIGNED = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
_SAMPLES = 40
"""Places on each piece of a line that no name may cover."""


def label_lines(axes: Axes, lines: Sequence[tuple[Line2D, str]], others: Sequence[Line2D] = ()) -> None:
    """Writes the name of every line beside one of its points that are in the frame, in the line's colour.

    A place costs what of lines and other names it covers, and a little where it is far from both ends. Whatever is
    cheapest is taken, for one line after the other.

    Args:
        axes: with its limits set.
        lines: with their names.
        others: that have none here; what is written on the axes already is not covered either.
    """
    laid_out(axes)
    drawn = np.concatenate([_sampled(line) for line in (*(line for line, _ in lines), *others)])
    frame = axes.get_window_extent()
    taken = [text.get_window_extent().extents for text in axes.texts]
    scale = axes.figure.dpi / 72
    for line, name in lines:
        best = None
        for point, inner in _visible(axes, line):
            for side in _SIDES:
                label = axes.annotate(
                    name,
                    point,
                    xytext=(_DISTANCE * side[0], _DISTANCE * side[1]),
                    textcoords="offset points",
                    ha=_ALIGNED[side[0]][0],
                    va=_ALIGNED[side[1]][1],
                    color=line.get_color(),
                    fontweight="bold",
                )
                box = label.get_window_extent().extents
                cost = _cost(box, drawn, taken, frame.extents, scale) + 3 * inner + 0.1 * _SIDES.index(side)
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, label, box)
                else:
                    label.remove()
        if best is not None:
            taken.append(best[2])


def _visible(axes: Axes, line: Line2D) -> Iterator[tuple[tuple[float, float], bool]]:
    """The line's points in the frame, the places where it leaves the frame among them, and whether each is inner."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = _pixels(line)
    frame = axes.get_window_extent()
    points = [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
    inside = [index for index, (x, y) in enumerate(points) if left <= x <= right and bottom <= y <= top]
    for index in inside:
        yield points[index], index not in (inside[0], inside[-1])
    for index in range(len(places) - 1):
        if (index in inside) == (index + 1 in inside):
            continue
        (x0, y0), (x1, y1) = places[index], places[index + 1]
        edge = frame.y1 if max(y0, y1) > frame.y1 else frame.y0
        if (y0 - edge) * (y1 - edge) < 0:
            crossing = x0 + (x1 - x0) * (edge - y0) / (y1 - y0)
            x, y = axes.transData.inverted().transform((crossing, edge))
            yield (float(x), float(y)), False


def _cost(
    box: Sequence[float],
    drawn: np.ndarray,
    taken: Sequence[Sequence[float]],
    frame: Sequence[float],
    scale: float,
) -> float:
    x0, y0, x1, y1 = box
    margin = _CLEARANCE * scale
    covered = (drawn > (x0 - margin, y0 - margin)) & (drawn < (x1 + margin, y1 + margin))
    overlaps = sum(x0 < b[2] + margin and b[0] < x1 + margin and y0 < b[3] and b[1] < y1 for b in taken)
    outside = max(frame[0] - x0, frame[1] - y0, x1 - frame[2], y1 - frame[3], 0)
    return float(covered.all(1).sum()) + 1000 * overlaps + 10 * outside


def _sampled(line: Line2D) -> np.ndarray:
    """Places on the line as it is drawn, in pixels ``[N, 2]``."""
    places = _pixels(line)
    shares = np.linspace(0, 1, _SAMPLES)[:, None]
    pieces = [start + shares * (end - start) for start, end in pairwise(places)]
    return np.concatenate([places, *pieces])


def _pixels(line: Line2D) -> np.ndarray:
    return line.get_transform().transform(np.asarray(line.get_xydata()))
