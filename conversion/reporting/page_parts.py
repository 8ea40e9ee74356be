"""What a report's page consists of, before it is HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.filesize import decimal

from .differences import Piece
from .inline_svg import inline_svg
from .picture_style import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 400, 270
"""Points of a chart, which a telephone shows whole."""


@dataclass(frozen=True)
class Cell:
    """What a table shows, and by what its rows are sorted."""

    shown: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """Columns by name; the first one names the rows. A ``folded`` table is shown when it is asked for."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Tile:
    """One figure that is worth a glance, and what it is to be compared with."""

    name: str
    shown: str
    beside: str


@dataclass(frozen=True)
class Slider:
    """Bytes of a sequence of as many tokens as the reader chooses: of every series at each of the ``contexts``."""

    contexts: Sequence[int]
    series: dict[str, Sequence[int]]

    @property
    def start(self) -> int:
        """The index of the context that is shown first: 32k, or what comes closest."""
        return min(range(len(self.contexts)), key=lambda index: abs(self.contexts[index] - 2**15))

    def as_json(self) -> dict[str, Any]:
        """What the script shows, ready to be shown."""
        return {
            "contexts": [f"{tokens:,}" for tokens in self.contexts],
            "series": [
                {"name": name, "shown": [decimal(size) for size in sizes], "bytes": list(sizes)}
                for name, sizes in self.series.items()
            ],
        }


@dataclass(frozen=True)
class Sample:
    """A prompt, and how both models go on, in pieces that the other one has too or not."""

    text: str
    prompt: str
    source: list[Piece]
    converted: list[Piece]
    told: str


@dataclass(frozen=True)
class Command:
    """What it is good for, and the command."""

    told: str
    command: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption."""

    caption: str
    svg: Markup


@dataclass
class Section:
    """A part of the page under a heading; ``key`` is its anchor."""

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    slider: Slider | None = None
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """All of it; ``lede`` says in a sentence or two what was found."""

    title: str
    lede: str
    tiles: list[Tile]
    sections: list[Section]


def chart(
    name: str, caption: str, description: str, draw: Callable[[Axes], None], size: tuple[int, int] = (_WIDTH, _HEIGHT)
) -> Chart:
    """What ``draw`` draws on one pair of axes; see `inline_svg` for the texts."""
    return figure_chart(name, caption, description, lambda figure: draw(figure.subplots()), size)


def figure_chart(
    name: str, caption: str, description: str, draw: Callable[[Figure], None], size: tuple[int, int] = (_WIDTH, _HEIGHT)
) -> Chart:
    """As `chart`, of something that makes its own axes."""
    with picture(*size) as figure:
        draw(figure)
        return Chart(caption, inline_svg(figure, name, caption, description))


def number(value: float | None, form: str = ",.2f") -> Cell:
    """A number in a table; what was not measured is a dash, and sorted behind all others."""
    return Cell("-", float("inf")) if value is None else Cell(format(value, form), value)


def share(value: float | None) -> Cell:
    """A share of 1 in per cent."""
    return number(value, ".1%")


def size(value: int | None) -> Cell:
    """A number of bytes."""
    return Cell("-", float("inf")) if value is None else Cell(decimal(value), value)


def word(value: str) -> Cell:
    """A word in a table."""
    return Cell(value, value)
