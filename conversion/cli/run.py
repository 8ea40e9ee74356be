"""``mla run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from .convert import convert_by
from .options import DryRun, Quiet


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with the options of convert, and source and output.")],
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Converts a model by a recipe file; a stopped conversion goes on with the same command.

    Example: mla run hub_configs/llama-3.1-8b.recipe.yaml --dry-run
    """
    from ..recipe import read_recipe

    convert_by(read_recipe(expanded(recipe)), dry_run=dry_run, quiet=quiet)
