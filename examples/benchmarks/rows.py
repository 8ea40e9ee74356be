"""How the benchmarks print what they measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_rows(rows: list[dict[str, Any]], as_json: bool, shown: Sequence[str] | None = None) -> None:
    """Rows of one kind on stdout: as JSON, or as a table of the columns ``shown``, by default all."""
    if as_json:
        print(json.dumps(rows))
        return
    columns = shown or tuple(rows[0])
    table = Table(*columns)
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)
