"""``mla plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, Model, taking_recipe
from .output import show_either


@taking_recipe
def plan(
    model: Model,
    output: Annotated[Path, typer.Option(help="Where the checkpoint would go.")] = Path("out"),
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Ranks, cache size, expected time and memory of a conversion; nothing is written.

    Example: mla plan HuggingFaceTB/SmolLM2-135M-Instruct --cache 25%
    """
    from ..planning.plan import make_plan
    from ..recipe import make_recipe
    from ..sources import open_source

    recipe = make_recipe(source=model, output=output, **options)
    made = make_plan(recipe, open_source(model))
    show_either(made.as_json(), [made.table(f"{model} → {output}")], as_json=as_json)
