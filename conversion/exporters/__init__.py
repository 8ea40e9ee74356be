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
from ..checkpoint.reader import SafetensorsReader
from ..checkpoint.writer import ShardWriter
from ..errors import ConversionError, SourceError
from ..progress import counting
from .base import Exporter
from .vllm import VllmExporter

EXPORTERS: dict[str, Exporter] = {exporter.name: exporter for exporter in (VllmExporter(),)}


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
        progress: counts the shards.

    Raises:
        ConversionError: the target is unknown or cannot express the model, or ``output`` exists.
    """
    if to not in EXPORTERS:
        raise ConversionError(f"unknown target {to!r}; choose one of {', '.join(EXPORTERS)}.")
    location = locate(model)
    before = location.config()
    if not hasattr(before, "kv_lora_ranks"):
        raise SourceError(f"{model} is a {before.model_type} model, not one of this library; convert it first.")
    exporter = EXPORTERS[to]
    after = exporter.config(before)
    reader = SafetensorsReader(location.folder)
    layout = {}
    for name in reader.names:
        stored = torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta")
        layout[name] = exporter.tensor(name, stored, before, after)
    with publishing(output) as folder:
        writer = ShardWriter(folder, layout)
        with counting(progress, "writing", len(writer.files)) as step:
            for file in writer.files:
                writer.write(file, lambda name: [exporter.tensor(name, reader.tensor(name), before, after).flatten()])
                step()
        writer.write_index()
        after.save_pretrained(folder)
        location.generation_config(before).save_pretrained(folder)
        location.tokenizer().save_pretrained(folder)
    dtype = before.dtype or torch.bfloat16
    return Export(output, before.cache_bytes_per_token(dtype), after.cache_bytes_per_token(dtype))


__all__ = ["EXPORTERS", "Export", "Exporter", "export_checkpoint"]
