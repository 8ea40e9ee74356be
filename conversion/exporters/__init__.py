"""The targets of `mla export` by name.

In: a converted checkpoint. Out: the same for an engine that wants other names, shapes or types. A new target is one
file with a `base.Exporter`, and one entry in `EXPORTERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from ..checkpoint.atomic import publishing
from ..checkpoint.location import locate
from ..errors import ConversionError, SourceError
from .base import Exporter
from .deepseek_v3 import DeepseekV3Exporter
from .gguf_file import GgufExporter
from .mlx import MlxExporter
from .vllm import VllmExporter

_ALL: tuple[Exporter, ...] = (DeepseekV3Exporter(), GgufExporter(), MlxExporter(), VllmExporter())
EXPORTERS = {exporter.name: exporter for exporter in _ALL}


@dataclass(frozen=True)
class Export:
    """What was written, and what its cache costs a token, before and after."""

    output: Path
    cache_bytes_per_token: int
    exported_cache_bytes_per_token: int


def export_checkpoint(model: str, output: Path, to: str, progress: Progress) -> Export:
    """Writes a converted checkpoint in another form, tensor by tensor.

    Args:
        model: a converted checkpoint, or any of this library's models.
        output: a new folder; it appears when it is complete.
        to: a name in `EXPORTERS`.
        progress: counts what is written.

    Raises:
        SourceError: it is no model of this library.
        ConversionError: the target is unknown or cannot express the model, or ``output`` exists.
    """
    if to not in EXPORTERS:
        raise ConversionError(f"unknown target {to!r}; choose one of {', '.join(EXPORTERS)}.")
    location = locate(model)
    config = location.config()
    if not hasattr(config, "kv_lora_ranks"):
        raise SourceError(f"{model} is a {config.model_type} model, not one of this library; convert it first.")
    with publishing(output) as folder:
        exported = EXPORTERS[to].write(location, config, folder, progress)
    return Export(output, config.cache_bytes_per_token(config.dtype or torch.bfloat16), exported)


__all__ = ["EXPORTERS", "Export", "Exporter", "export_checkpoint"]
