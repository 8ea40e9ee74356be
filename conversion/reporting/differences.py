"""Where two texts differ, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Piece = tuple[str, bool]
"""Some text, and whether the other text lacks it."""
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def marked(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, which joined give them back."""
    words = _WORDS.findall(first), _WORDS.findall(second)
    found: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, *places in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((places[:2], places[2:])):
            text = "".join(words[side][start:end])
            if text:
                found[side].append((text, kind != "equal"))
    return found
