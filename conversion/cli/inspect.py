"""``mla inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.paths import expanded
from ..errors import ConversionError
from .options import AsJson
from .output import show_either


def inspect(
    model: Annotated[str | None, typer.Argument(help="A folder, a .gguf file or a Hub id; or give --config.")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json of any model, with or without weights.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence. \\[default: 131072]")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of the cache over the context.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a model is, what can be done with it, and what its cache costs.

    Example: mla inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from ..reporting.cache_report import report_memory
    from ..reporting.inspection import inspect_model

    if (model is None) == (config is None):
        raise ConversionError("give either a model or --config FILE.")
    shown: dict[str, Any] = {}
    tables: list[Any] = []
    if model is not None:
        inspection = inspect_model(model)
        shown, tables = inspection.as_json(), [inspection.table()]
    if config is not None or context is not None or plot is not None:
        report = report_memory(expanded(config) if config else str(model), context)
        shown, tables = shown | report.as_json(), tables + report.tables()
        if plot is not None:
            from ..reporting.plots import plot_cache

            plot_cache(report, expanded(plot))
    show_either(shown, tables, as_json=as_json)
