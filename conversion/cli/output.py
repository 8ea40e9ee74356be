"""Results on stdout: as tables, or as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from ..terminal import console


def show(tables: Sequence[Any]) -> None:
    """Prints tables."""
    for table in tables:
        console().print(table)


def show_either(value: dict[str, Any], tables: Sequence[Any], *, as_json: bool) -> None:
    """Prints ``value`` as JSON, or the tables that say the same."""
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")
    else:
        show(tables)
