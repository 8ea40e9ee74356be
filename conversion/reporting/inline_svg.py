"""Figures as SVG within a page: in the page's colours, told to who does not see them, their ids their own."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from .picture_style import BLUE, GREEN, INK, ORANGE, PAPER, PURPLE, QUIET, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_VARIABLES = {
    INK: "currentColor",
    QUIET: "var(--quiet)",
    PAPER: "var(--paper)",
    BLUE: "var(--blue)",
    VERMILLION: "var(--vermillion)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    ORANGE: "var(--orange)",
    SKY: "var(--sky)",
}
"""What the style sheet calls the colours of `picture_style`, as light or dark as the reader has the page."""
_COLOURS = re.compile("|".join(_VARIABLES))
_DROPPED = (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")


def inline_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as one ``svg`` element.

    Args:
        figure: in the style of `picture_style`.
        name: of letters, digits and hyphens; no other chart of the page has it.
        title: read out as its name.
        description: read out behind it: what is to be seen.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag in _DROPPED]:
            parent.remove(child)
    for element in root.iter():
        for attribute, value in list(element.items()):
            element.set(attribute, _renamed(_in_page(value), attribute, name))
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        told = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        told.text = text
        root.insert(place, told)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _in_page(value: str) -> str:
    return _COLOURS.sub(lambda found: _VARIABLES[found.group()], value)


def _renamed(value: str, attribute: str, name: str) -> str:
    """Ids are counted anew in every figure."""
    if attribute == "id":
        return f"{name}-{value}"
    return re.sub(r"(^|url\()#", rf"\g<1>#{name}-", value)
