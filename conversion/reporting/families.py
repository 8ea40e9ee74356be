"""Which families convert, and what becomes of them: the table of the README, made from the registry."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from rich.table import Table

import modeling_mla
from modeling_mla.vllm_mla import refuse_unservable

from ..sources import SOURCES, SourceModel

_COLUMNS = ("family", "models", "what is special", "vLLM")


@dataclass(frozen=True)
class Family:
    """One family that converts, exactly and compressed.

    ``quirks`` are what its source has beside plain attention; ``served_by_vllm`` is False where our plugin refuses it.
    """

    name: str
    models: str
    quirks: str
    served_by_vllm: bool

    def row(self) -> tuple[str, ...]:
        """The family in the order of the table's columns."""
        return self.name, self.models, self.quirks, "padded" if self.served_by_vllm else "no"


def families() -> list[Family]:
    """Every family of the registry, by name."""
    return [_family(name, source) for name, source in sorted(SOURCES.items())]


def _family(name: str, source: type[SourceModel]) -> Family:
    quirks = (inspect.getdoc(source) or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")
    return Family(name, source.models, quirks, _is_served_by_vllm(source))


def _is_served_by_vllm(source: type[SourceModel]) -> bool:
    config = getattr(modeling_mla, f"{source.mla_name}Config")()
    try:
        # Of one token: how long a text may be depends on the checkpoint.
        refuse_unservable(config, 1, torch.bfloat16)
    except ValueError:
        return False
    return True


def markdown(found: list[Family]) -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(family.row())} |" for family in found)])


def table(found: list[Family]) -> Table:
    """The table for a terminal."""
    shown = Table(title="Families that convert", title_justify="left")
    for column in _COLUMNS:
        shown.add_column(column)
    for family in found:
        shown.add_row(*family.row())
    return shown
