"""``mla sweep``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.paths import expanded
from ..progress import durations, progress_for, told
from ..terminal import console
from .options import AsJson, DryRun, Model, Quiet, taking_recipe
from .output import command, show, show_either, show_json, show_next

if TYPE_CHECKING:
    from ..sweep.result import Size


@taking_recipe
def sweep(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the checkpoints and the report; a stopped sweep's too.")],
    cache: Annotated[
        str, typer.Option(help="Sizes as for convert, with commas between them; more may be added later.")
    ] = "50%,25%,12.5%",
    figures_only: Annotated[
        bool, typer.Option("--dry", help="Keep the figures alone: no checkpoint stays on the disk.")
    ] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Converts a model to several sizes of its cache, and shows what each costs and loses; start here.

    Example: mla sweep HuggingFaceTB/SmolLM2-135M-Instruct sizes --cache 50%,25%,12.5%
    """
    from ..reporting.page import HTML_NAME
    from ..reporting.report_files import JSON_NAME
    from ..sources import open_source
    from ..sweep.recipe import make_sweep
    from ..sweep.recommendation import recommended
    from ..sweep.result import PICTURE_NAME
    from ..sweep.sweep import run_sweep
    from ..sweep.tables import sweep_tables

    recipe = make_sweep(model, expanded(output), cache, figures_only=figures_only, **options)
    source = open_source(model)
    plans = recipe.plans(source)
    if dry_run:
        shown = {size: plan.as_json() for size, plan in plans.items()}
        show_either(shown, [plan.table(f"{model} → {plan.recipe.output}") for plan in plans.values()], as_json=as_json)
        return
    with progress_for(quiet=quiet) as progress:
        found = run_sweep(recipe, plans, source, progress)
    if as_json:
        show_json(found.as_json())
        return
    if not quiet:
        show(sweep_tables(found))
    files = ", ".join(str(recipe.folder / name) for name in (HTML_NAME, JSON_NAME, PICTURE_NAME))
    ready = f"{files} are ready after {found.seconds:.0f} s; in seconds: {told(durations(progress))}."
    console().print(f"{ready}\n{found.recommendation}", soft_wrap=True)
    if not quiet:
        best = recommended(found.sizes)
        show_next(_next(model, recipe.folder / best.cache, best))


def _next(model: str, checkpoint: Path, best: Size) -> dict[str, str]:
    from ..sweep.recommendation import heal_command

    if best.folder is None:
        made = command("mla", "convert", model, checkpoint, "--cache", best.cache)
        return {made: "makes the checkpoint"}
    return {
        command("mla", "chat", checkpoint): "talk to it",
        command("mla", "compare", model, checkpoint): "beside its source",
        heal_command(shlex.quote(str(checkpoint)), shlex.quote(model)): "brings it nearer",
    }
