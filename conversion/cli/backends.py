"""``mla backends``."""

from __future__ import annotations

from .options import AsJson
from .output import show_either


def backends(as_json: AsJson = False) -> None:
    """What can run absorbed attention on this machine, for which shapes, and what cannot, and why.

    Example: mla backends --json
    """
    from ..reporting.backends import as_json as to_json
    from ..reporting.backends import backends as ask
    from ..reporting.backends import orders, table

    found, order = ask(), orders()
    show_either(to_json(found, order), [table(found, order)], as_json=as_json)
