"""``mla families``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .output import show


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As in the README, on stdout.")] = False,
    engines: Annotated[bool, typer.Option("--engines", help="Which engines run them, and why not.")] = False,
) -> None:
    """Which models convert, and what serves them."""
    from ..exporters import engines as serving
    from ..reporting import families as reporting

    if engines:
        if markdown:
            sys.stdout.write(serving.engines_markdown() + "\n")
        else:
            show([serving.engines_table()])
        return
    found = reporting.families()
    if markdown:
        sys.stdout.write(reporting.markdown(found) + "\n")
    else:
        show([reporting.table(found)])
