"""Arguments and options that more than one command takes, each described once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a folder with one, or a Hub id (name\\[@revision]).")
]
Output = Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not exist.")]
Seed = Annotated[int, typer.Option(help="Of all sampling.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps. \\[default: auto, what Accelerate takes]", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables: the last line alone.")]


def _of_recipe(
    *,
    method: Annotated[
        str,
        typer.Option(help="exact; attention_aware, which compresses; transmla or mha2mla, as their papers have it."),
    ] = "attention_aware",
    cache: Annotated[
        str | None,
        typer.Option(
            help="50% of the source's bytes, 192 (values a token and layer), or 11520B (bytes a token; KB, KiB). "
            "Bytes are spent on values and on their bits. \\[default: half, or all for an exact method]"
        ),
    ] = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help="Pins the latent's width in every layer.")] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="Pins the rotary key's width in every layer.")] = None,
    latent_bits: Annotated[
        int | None,
        typer.Option(
            "--latent-bits", "--bits", help="Pins the bits of a latent's value: 2, 3, 4, 5, 6, 8, or 16, not coded."
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(help="free, or deepseek, which every engine reads: one rank, a rotary key of 64, no biases."),
    ] = "free",
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Equal ranks and a rotary key of 64 or 32: what serving kernels take.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text file, a data set as name\\[@configuration]\\[:split\\[:column]], or self: text that the model "
            "writes. \\[default: a shipped mix]"
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of calibration text.")] = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help="Of the weights written. \\[default: the source's]")] = None,
    device: Device = "auto",
    shard_size: Annotated[
        str | None, typer.Option(help="The most bytes of a file of weights, as 500MB. \\[default: 5GB]")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is measured on the text, for other budgets.")
    ] = None,
) -> None:
    """The options of a recipe, beside its source and its output."""


def taking_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a recipe to a command, which gets those that were given as the dictionary ``options``.

    A parameter of the command's own takes the place of the recipe's of that name.
    """
    own = inspect.signature(command, eval_str=True)
    of_recipe = inspect.signature(_of_recipe, eval_str=True).parameters
    shared = {name: parameter for name, parameter in of_recipe.items() if name not in own.parameters}

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in shared}
        given = {name: value for name, value in options.items() if value != shared[name].default}
        command(**arguments, options=given)

    parameters = [parameter for name, parameter in own.parameters.items() if name != "options"]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    optional = [parameter for parameter in parameters if parameter.default is not parameter.empty]
    keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in optional]
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*required, *shared.values(), *keyword_only]
    )
    return run
