"""``mla convert``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..progress import durations, peak_memory, progress_for, told
from ..terminal import console
from .options import DryRun, Model, Output, Quiet, taking_recipe
from .output import command, show, show_next, told_in

if TYPE_CHECKING:
    from ..recipe import Recipe


@taking_recipe
def convert(
    model: Model, output: Output, dry_run: DryRun = False, quiet: Quiet = False, *, options: dict[str, Any]
) -> None:
    """Converts a model; a stopped conversion goes on with the same command.

    Example: mla convert HuggingFaceTB/SmolLM2-135M-Instruct out --cache 25%
    """
    from ..recipe import make_recipe

    convert_by(make_recipe(source=model, output=output, **options), dry_run=dry_run, quiet=quiet)


def convert_by(recipe: Recipe, *, dry_run: bool, quiet: bool) -> None:
    """Shows the plan, converts unless this is a dry run, and shows what was found and what may come next.

    Raises:
        ConversionError: see `run_plan`; what the output or the recipe is refused for, before the plan is shown.
    """
    from ..pipeline.conversion import run_plan
    from ..pipeline.inputs import check_output
    from ..planning.costs import Costs
    from ..planning.plan import make_plan
    from ..sources import open_source

    started, output = time.monotonic(), recipe.output
    if not dry_run:
        check_output(output)
    source = open_source(recipe.source)
    plan = make_plan(recipe, source)
    if dry_run or not quiet:
        show([plan.table(f"{recipe.source} → {output}")])
    if dry_run:
        return
    with progress_for(quiet=quiet) as progress:
        finished = run_plan(plan, source, progress)
    if not quiet:
        show(finished.report.tables()[:-1])
    took = Costs(time.monotonic() - started, peak_memory(), finished.disk_bytes)
    ready = f"{output} is ready after {took} (expected: {plan.costs}); in seconds: {told(durations(progress))}."
    console().print(f"{ready} {told_in(output)}", soft_wrap=True)
    if not quiet:
        show_next(
            {
                command("mla", "chat", output): "talk to it",
                command("mla", "verify", output, "--against", recipe.source): "measure it on more text, or your own",
                command("mla", "heal", output, "--teacher", recipe.source, "--minutes", 30): "bring it nearer",
                command(
                    "mla", "export", output, "DIR", "--to", "mlx"
                ): "for another engine; see mla families --engines",
            }
        )
