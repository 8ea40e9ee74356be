"""``mla compare``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ..progress import counting, shown_progress
from .options import AsJson, Device, Model
from .output import show_either


def compare(
    model: Model,
    converted: Annotated[str, typer.Argument(help="What became of it.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="What is asked. \\[default: three questions]")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answers of a model and its conversion side by side, with a mark where they part.

    Example: mla compare HuggingFaceTB/SmolLM2-135M-Instruct out "Why is the sky blue?"
    """
    from ..answering.comparison import PROMPTS, compare_answers
    from ..answering.speaker import Speaker

    asked = prompts or PROMPTS
    load = [partial(Speaker, one, device) for one in (model, converted)]
    with shown_progress() as progress, counting(progress, "answering", 2 * len(asked)) as step:
        pairs = compare_answers(load, asked, tokens, step)
    show_either({"answers": [pair.as_json() for pair in pairs]}, [pair.table() for pair in pairs], as_json=as_json)
