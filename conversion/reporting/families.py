"""Which families convert, and what becomes of them: the table that `mla families` shows, made from the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import CONFIG_MAPPING

from ..checkpoint.location import Location
from ..errors import ConversionError
from ..methods import METHODS, Method
from ..planning.exact_form import exact_config
from ..sources import SOURCES, SourceModel, source_of

_COLUMNS = ("family", "models", "what is special", "exact", "compressed by")
SMALLEST = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
SMALLEST |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), 8)


@dataclass(frozen=True)
class Family:
    """One family that converts.

    ``quirks`` are what its source has beside plain attention; ``exact`` says whether nothing need be lost, and
    ``compressed_by`` which methods take it.
    """

    name: str
    models: str
    quirks: str
    exact: bool
    compressed_by: tuple[str, ...]

    def row(self) -> tuple[str, ...]:
        """The family in the order of the table's columns."""
        exact = "yes" if self.exact else "no"
        return self.name, self.models, self.quirks, exact, ", ".join(self.compressed_by)


def families() -> list[Family]:
    """Every family of the registry, by name."""
    return [_family(name, source) for name, source in sorted(SOURCES.items())]


def _family(name: str, source: type[SourceModel]) -> Family:
    quirks = (inspect.getdoc(source) or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")
    smallest = source_of(Location(name, Path()), CONFIG_MAPPING[name](**SMALLEST, pad_token_id=None))
    compressing = [method for method in METHODS.values() if not method.lossless]
    return Family(
        name,
        source.models,
        quirks,
        exact=_succeeds(lambda: exact_config(smallest, torch.float32)),
        compressed_by=tuple(method.name for method in compressing if _takes(method, smallest)),
    )


def _takes(method: Method, source: SourceModel) -> bool:
    weights = source.without_weights().attention(0, torch.float32)
    return _succeeds(lambda: method.statistics(source.geometry(0), weights, seed=0))


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except ConversionError:
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
