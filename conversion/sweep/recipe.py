"""What the user asked a sweep for, validated before anything is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from ..planning.plan import ConversionPlan, make_plan
from ..recipe import Recipe, make_recipe
from ..sources import SourceModel

_SEPARATOR = re.compile(r"\s*,\s*")
_STATISTICS, _FIGURES = ".statistics", ".figures"


@dataclass(frozen=True)
class SweepRecipe:
    """One sweep.

    Args:
        recipes: of the conversions by size, as the user wrote it; they differ in it and in the output alone.
        folder: of the sweep.
        figures_only: no checkpoint is kept.
        keeps_statistics: the folder of the statistics is the user's, and stays.
    """

    recipes: dict[str, Recipe]
    folder: Path
    figures_only: bool
    keeps_statistics: bool

    @property
    def passing(self) -> list[Path]:
        """Folders that are needed until all sizes are there."""
        return [self.folder / _FIGURES] + ([] if self.keeps_statistics else [self.folder / _STATISTICS])

    @property
    def any(self) -> Recipe:
        """One of them, for what they share."""
        return next(iter(self.recipes.values()))

    def plans(self, source: SourceModel) -> dict[str, ConversionPlan]:
        """Those of all sizes; a size that cannot be is refused before any is converted."""
        return {cache: make_plan(recipe, source) for cache, recipe in self.recipes.items()}


def make_sweep(source: str, folder: Path, caches: str, *, figures_only: bool, **options: Any) -> SweepRecipe:
    """A sweep of the sizes ``caches``, with commas between them; ``options`` are those of a `Recipe`.

    Raises:
        ConversionError: an option is wrong, or a size is asked for twice.
    """
    sizes = _SEPARATOR.split(caches.strip().strip(","))
    for size in sizes:
        if sizes.count(size) > 1:
            raise ConversionError(f"the sizes {caches} name {size} twice; leave one out.")
    outputs = folder / _FIGURES if figures_only else folder
    given = {"source": source, "statistics": folder / _STATISTICS} | options
    return SweepRecipe(
        {size: make_recipe(**given, cache=size, output=outputs / size.replace(" ", "")) for size in sizes},
        folder,
        figures_only,
        keeps_statistics="statistics" in options,
    )
