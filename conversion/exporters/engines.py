"""Which engines run a converted model of each family, and why not: what `mla families --engines` shows."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table
from transformers import CONFIG_MAPPING

from modeling_mla.vllm_mla import refuse_unservable

from ..checkpoint.location import Location
from ..errors import ConversionError
from ..planning.deepseek_layout import why_unfit
from ..planning.exact_form import exact_config
from ..reporting.families import SMALLEST
from ..sources import SOURCES, SourceModel, source_of
from .deepseek_form import why_no_deepseek
from .mlx import MlxExporter
from .whole_queries import without_head_maps

COLUMNS = ("family", "Transformers", "mlx-lm", "vLLM, by our plugin", "vLLM, SGLang, llama.cpp, as DeepSeek's")
"""The last is for models in ``--layout deepseek``."""


def engine_rows() -> list[tuple[str, ...]]:
    """A row for every family of the registry, of a model as its configuration is by default."""
    return [(name, *_engines(name)) for name in sorted(SOURCES)]


def _engines(name: str) -> tuple[str, ...]:
    source = source_of(Location(name, Path()), CONFIG_MAPPING[name](**SMALLEST, pad_token_id=None))
    return "yes", _by_mlx(source), _by_vllm(source), _as_deepseek(source)


def _by_mlx(source: SourceModel) -> str:
    try:
        MlxExporter().config(exact_config(source, torch.bfloat16))
    except ConversionError as error:
        return _refused(error)
    return "yes"


def _by_vllm(source: SourceModel) -> str:
    try:
        # Of one token: how long a text may be depends on the checkpoint.
        refuse_unservable(without_head_maps(exact_config(source, torch.bfloat16)), 1, torch.bfloat16)
    except ValueError as error:
        return _refused(error)
    return "yes"


def _as_deepseek(source: SourceModel) -> str:
    reason = why_unfit(source) or why_no_deepseek(exact_config(source, torch.bfloat16))
    return "yes" if reason is None else f"no: {reason}"


def _refused(error: Exception) -> str:
    """Without what to do instead."""
    return f"no: {str(error).partition(';')[0].removesuffix('.')}"


def engines_markdown() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in engine_rows())])


def engines_table() -> Table:
    """The table for a terminal."""
    shown = Table(title="Engines that run them", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column)
    for row in engine_rows():
        shown.add_row(*row)
    return shown
