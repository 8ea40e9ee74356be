"""``mla families``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .output import show


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As in the README, on stdout.")] = False,
) -> None:
    """Which models convert, and what serves them."""
    from ..reporting import families as reporting

    found = reporting.families()
    if markdown:
        sys.stdout.write(reporting.markdown(found) + "\n")
    else:
        show([reporting.table(found)])
