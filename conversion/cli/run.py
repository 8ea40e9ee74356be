"""``mla run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from .convert import convert_by
from .options import DryRun


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with the options of convert, and source and output.")],
    dry_run: DryRun = False,
) -> None:
    """Converts a model by a recipe file."""
    from ..recipe import read_recipe

    convert_by(read_recipe(expanded(recipe)), dry_run=dry_run)
