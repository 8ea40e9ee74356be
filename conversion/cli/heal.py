"""``mla heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.paths import expanded
from ..progress import progress_for
from ..terminal import console
from .options import Device, Quiet, Seed
from .output import command, show_next, told_in


def heal(
    model: Annotated[str, typer.Argument(help="The converted checkpoint.")],
    teacher: Annotated[str, typer.Option(help="The model that it was made from.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, or a data set as name\\[@configuration]\\[:split\\[:column]], with :WEIGHT behind it; "
            "default, the shipped mix; self, text that the teacher writes. Repeat it for a mix. \\[default: default]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the healed checkpoint; must not exist. \\[default: MODEL-healed]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Of training and validation.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of minutes; can be repeated exactly.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="In their order, with commas. \\[default: layers,logits,long]", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with these options, and the settings of each stage.")
    ] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train adapters of this rank, and merge them.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights: none keeps its bytes.")] = False,
    also: Annotated[list[str] | None, typer.Option(help="mlp-out: first solve every dense down_proj anew.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Teaches a converted model to do what its source does; a stopped healing goes on with the same command.

    Example: mla heal out --teacher HuggingFaceTB/SmolLM2-135M-Instruct --minutes 30
    """
    from ..healing.heal import heal as heal_by
    from ..healing.recipe import make_healing_recipe, read_healing_recipe

    named = None if stages is None else [{"stage": name.strip()} for name in stages.split(",")]
    options: dict[str, Any] = {"data": data, "output": out, "minutes": minutes, "steps": steps, "stages": named}
    options |= {"lora_rank": lora, "full": full, "also": also, "seed": seed, "device": device}
    defaults = (None, False, 0, "auto")
    given = {name: value for name, value in options.items() if value not in defaults}
    given |= {"model": model, "teacher": teacher}
    asked = make_healing_recipe(**given) if recipe is None else read_healing_recipe(expanded(recipe), **given)
    with progress_for(quiet=quiet) as progress:
        healed = heal_by(asked, progress)
    change = f"validation KL {healed.kl_before:.4f} → {healed.kl_after:.4f} nats a token after {healed.steps} steps"
    end = (
        f"{asked.folder} is ready."
        if healed.improved
        else f"not improved: {asked.folder} holds the weights of {model}."
    )
    note = "" if healed.note is None else f" ({healed.note})"
    console().print(f"{change}{note}; {end} {told_in(asked.folder)}", soft_wrap=True)
    if not quiet:
        show_next(
            {
                command("mla", "verify", asked.folder, "--against", asked.teacher): "all measures, on held-out text",
                command("mla", "compare", asked.teacher, asked.folder): "answers beside its source's",
            }
        )
