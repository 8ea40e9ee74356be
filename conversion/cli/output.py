"""Results on stdout: as tables, or as one JSON object; and what a user may do next."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..terminal import console


def show(tables: Sequence[Any]) -> None:
    """Prints tables."""
    for table in tables:
        console().print(table)


def show_either(value: dict[str, Any], tables: Sequence[Any], *, as_json: bool) -> None:
    """Prints ``value`` as JSON, or the tables that say the same."""
    if as_json:
        show_json(value)
    else:
        show(tables)


def show_json(value: dict[str, Any]) -> None:
    """Prints ``value`` as one line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")


def command(*words: object) -> str:
    """A command as a shell takes it."""
    return shlex.join(map(str, words))


def told_in(folder: Path) -> str:
    """The sentence that names the page of the report in ``folder``."""
    from ..reporting.page import HTML_NAME

    return f"{folder / HTML_NAME} shows what was found."


def show_next(commands: Mapping[str, str]) -> None:
    """Prints what may come next: what it is for, by command."""
    width = max(map(len, commands))
    console().print("\nNext:")
    for line, purpose in commands.items():
        console().print(f"  {line:{width}}  # {purpose}", soft_wrap=True)
