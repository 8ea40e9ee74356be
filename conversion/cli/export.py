"""``mla export``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from ..progress import progress_for
from ..terminal import console
from .options import Output, Quiet
from .output import show_next


def export(
    model: Annotated[str, typer.Argument(help="A converted checkpoint.")],
    output: Output,
    to: Annotated[
        str,
        typer.Option(help="deepseek_v3 (stock), gguf (llama.cpp), mlx (mlx-lm), vllm (padded, for our plugin)."),
    ],
    quiet: Quiet = False,
) -> None:
    """Writes a converted checkpoint for something else than Transformers; mla families --engines says for what.

    Example: mla export out out-gguf --to gguf
    """
    from ..exporters import EXPORTERS, export_checkpoint

    with progress_for(quiet=quiet) as progress:
        exported = export_checkpoint(model, expanded(output), to, progress)
    before, after = exported.cache_bytes_per_token, exported.exported_cache_bytes_per_token
    told = f"{output} is ready; its cache is {after} B a token, before {before} B."
    console().print(told, soft_wrap=True)
    if not quiet:
        show_next({line.format(folder=shlex.quote(str(output))): "run it" for line in EXPORTERS[to].runs})
