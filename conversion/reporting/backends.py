"""Backends of absorbed attention on this machine: what is usable, for what, and why not."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from modeling_mla.backends_mla import BACKENDS, OVERRIDE, devices, preferred, refusals, why_unavailable


@dataclass(frozen=True)
class Backend:
    """One backend.

    ``serves`` is what it takes; ``unusable`` has the reason for every device on which it does not run here, and
    ``usable`` the other devices.
    """

    name: str
    serves: str
    usable: list[str]
    unusable: dict[str, str]


def backends() -> list[Backend]:
    """Every backend of the registry, asked about every device of this machine."""
    return [
        Backend(
            name,
            backend.serves,
            [_named(device) for device in devices() if why_unavailable(name, device) is None],
            {_named(device): reason for device, reason in refusals(name).items()},
        )
        for name, backend in BACKENDS.items()
    ]


def orders() -> dict[str, list[str]]:
    """What ``auto`` tries on every device of this machine."""
    return {_named(device): list(preferred(device)) for device in devices()}


def as_json(found: list[Backend], order: dict[str, list[str]]) -> dict[str, Any]:
    """The table as values."""
    return {
        "backends": [asdict(backend) for backend in found],
        "auto": order,
        "override": os.environ.get(OVERRIDE),
    }


def table(found: list[Backend], order: dict[str, list[str]]) -> Table:
    """The table for a terminal."""
    override = os.environ.get(OVERRIDE)
    tried = "; ".join(f"{device}: {', '.join(names)}" for device, names in order.items())
    caption = f"auto tries, on {tried}. {OVERRIDE} is {override or 'not set'}."
    shown = Table(title="Backends of absorbed attention", title_justify="left", caption=caption, show_lines=True)
    for column in ("backend", "usable on", "why not", "serves"):
        shown.add_column(column)
    for backend in found:
        reasons = "\n".join(f"{device}: {reason}" for device, reason in backend.unusable.items())
        shown.add_row(backend.name, ", ".join(backend.usable) or "nothing here", reasons, backend.serves)
    return shown


def _named(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return f"cuda:{device.index} ({torch.cuda.get_device_name(device)})"
