"""``mla export``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..checkpoint.paths import expanded
from ..progress import shown_progress
from ..terminal import console
from .options import Output


def export(
    model: Annotated[str, typer.Argument(help="A converted checkpoint.")],
    output: Output,
    to: Annotated[
        str,
        typer.Option(help="deepseek_v3 (stock), gguf (llama.cpp), mlx (mlx-lm), vllm (padded, for our plugin)."),
    ],
) -> None:
    """Writes a converted checkpoint for something else than Transformers."""
    from ..exporters import export_checkpoint

    with shown_progress() as progress:
        exported = export_checkpoint(model, expanded(output), to, progress)
    before, after = exported.cache_bytes_per_token, exported.exported_cache_bytes_per_token
    told = f"{output} is ready; its cache is {after} B a token, before {before} B."
    console().print(told, soft_wrap=True)
