"""``mla heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from ..progress import shown_progress
from ..terminal import console
from .options import Device, Seed


def heal(
    model: Annotated[str, typer.Argument(help="The converted checkpoint.")],
    teacher: Annotated[str, typer.Option(help="The model that it was made from.")],
    data: Annotated[
        str, typer.Option(help="A text file, or a data set as name\\[@configuration]\\[:split\\[:column]].")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the healed checkpoint; must not exist.")],
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Of training and validation.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of minutes; can be repeated exactly.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train adapters of this rank, and merge them.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Distils the source's logits into a converted model's attention."""
    from ..healing.heal import heal as heal_by
    from ..healing.recipe import HealingRecipe

    recipe = HealingRecipe(model, teacher, data, expanded(out), minutes, steps, lora, seed, device)
    with shown_progress() as progress:
        healed = heal_by(recipe, progress)
    change = f"validation KL {healed.kl_before:.4f} → {healed.kl_after:.4f} nats a token after {healed.steps} steps"
    end = f"{out} is ready." if healed.improved else f"not improved: {out} holds the weights of {model}."
    console().print(f"{change}; {end}", soft_wrap=True)
