"""``mla convert``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..progress import durations, peak_memory, shown_progress, told
from ..terminal import console
from .options import DryRun, Model, Output, taking_recipe
from .output import show

if TYPE_CHECKING:
    from ..recipe import Recipe


@taking_recipe
def convert(model: Model, output: Output, dry_run: DryRun = False, *, options: dict[str, Any]) -> None:
    """Converts a model; a stopped conversion goes on with the same command."""
    from ..recipe import make_recipe

    convert_by(make_recipe(source=model, output=output, **options), dry_run=dry_run)


def convert_by(recipe: Recipe, *, dry_run: bool) -> None:
    """Shows the plan, converts unless this is a dry run, and shows what was found."""
    from ..pipeline.conversion import run_plan
    from ..planning.costs import Costs
    from ..planning.plan import make_plan
    from ..sources import open_source

    started, output = time.monotonic(), recipe.output
    source = open_source(recipe.source)
    plan = make_plan(recipe, source)
    show([plan.table(f"{recipe.source} → {output}")])
    if dry_run:
        return
    with shown_progress() as progress:
        finished = run_plan(plan, source, progress)
    show(finished.report.tables()[:-1])
    took = Costs(time.monotonic() - started, peak_memory(), finished.disk_bytes)
    ready = f"{output} is ready after {took} (expected: {plan.costs}); in seconds: {told(durations(progress))}."
    console().print(ready, soft_wrap=True)
