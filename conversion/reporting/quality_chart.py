"""Quality against the bytes of the cache, one line a way to spend them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from .free_labels import label_lines
from .picture_style import QUIET, SERIES, nice_ticks, plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = 1.7
"""Times the source's perplexity: what is worse leaves the frame, in which people work."""
_SHARES = (100, 75, 50, 37.5, 25, 12.5, 6.25, 3.125)
_RATIOS = (1, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7)


@dataclass(frozen=True)
class Way:
    """One way to spend bytes.

    Args:
        name: written beside its line.
        points: the share of the bytes of the source's cache, and the perplexity relative to the source's.
        dashed: it is the source itself, or somebody else's.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def draw_quality(axes: Axes, ways: Sequence[Way]) -> None:
    """Draws all of them, shares and ratios on logarithmic axes: half the bytes are one step to the left."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines = []
    for way, colour in zip(ways, cycle(SERIES), strict=False):
        points = sorted(way.points)
        (line,) = axes.plot(
            [100 * share for share, _ in points],
            [ratio for _, ratio in points],
            "s--" if way.dashed else "o-",
            color=colour,
        )
        lines.append((line, way.name))
    inside = [100 * share for way in ways for share, ratio in way.points if ratio <= WORST]
    worst = min(WORST, max((ratio for way in ways for _, ratio in way.points), default=1) * 1.02)
    axes.set_xlim(min(inside, default=6.25) / 1.25, max(inside, default=100) * 1.12)
    axes.set_ylim(1 / worst**0.06, max(worst, 1.05))
    source = axes.axhline(1, color=QUIET, linewidth=1.2, linestyle=":")
    axes.annotate("the source", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="top", color=QUIET,
                  xytext=(0, -2), textcoords="offset points")  # fmt: skip
    low, high = axes.get_xlim()
    plain_ticks(axes.xaxis, [share for share in _SHARES if low <= share <= high], "%")
    ratios = [ratio for ratio in _RATIOS if ratio <= axes.get_ylim()[1]]
    plain_ticks(axes.yaxis, ratios if len(ratios) > 2 else nice_ticks(*axes.get_ylim()), "\N{MULTIPLICATION SIGN}")
    axes.set_xlabel("bytes of the cache, of the source's")
    axes.set_ylabel("perplexity, of the source's")
    label_lines(axes, lines, [source])
