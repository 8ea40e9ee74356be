"""What is written to a terminal: names are shown as they are, and none is too strange for its encoding."""

from __future__ import annotations

import codecs
import io
import os
import sys

from rich.console import Console

_ASCII = {"→": "->", "▶": ">"}
_UNKNOWN = "?"


def console(*, stderr: bool = False, every_process: bool = False) -> Console:
    """Prints text literally: brackets in a name are no markup, colons round a word no emoji.

    Of the processes that a launcher has started only the first one prints, unless ``every_process`` shall.
    """
    quiet = not every_process and os.environ.get("RANK", "0") != "0"
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, quiet=quiet)


def accept_all_characters() -> None:
    """From here on stdout and stderr replace what their encoding does not have, where they would fail."""
    codecs.register_error("mla", _replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mla")


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    failed = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, _UNKNOWN) for character in failed), error.end
