"""``mla families``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from .options import AsJson
from .output import show_either


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As in the READMEs, on stdout.")] = False,
    engines: Annotated[bool, typer.Option("--engines", help="Which engines run them, and why not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Which models convert, and what serves them.

    Example: mla families --engines
    """
    from ..exporters import engines as serving
    from ..reporting import families as reporting

    if engines:
        if markdown:
            sys.stdout.write(serving.engines_markdown() + "\n")
            return
        rows = [dict(zip(serving.COLUMNS, row, strict=True)) for row in serving.engine_rows()]
        show_either({"engines": rows}, [] if as_json else [serving.engines_table()], as_json=as_json)
        return
    found = reporting.families()
    if markdown:
        sys.stdout.write(reporting.markdown(found) + "\n")
        return
    show_either({"families": [asdict(family) for family in found]}, [reporting.table(found)], as_json=as_json)
