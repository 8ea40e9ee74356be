"""From converted layers to a checkpoint: their attention, and every other tensor of the source bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedConfig

from .checkpoint.journal import WorkFolder
from .checkpoint.writer import ShardWriter
from .layers import MLAWeights
from .progress import counting
from .sources import SourceModel


def write_shards(
    source: SourceModel,
    layers: Sequence[MLAWeights],
    config: PreTrainedConfig,
    cast: torch.dtype | None,
    work: WorkFolder,
    progress: Progress,
) -> None:
    """Writes the weights into the work folder's checkpoint; shards that the journal names are there already.

    Args:
        layers: the converted attention, loaded when it is looked at.
        config: of the converted model.
        cast: the type of every tensor; None keeps what each is stored as.

    Raises:
        VerificationError: a tensor is not finite or not read back as it was written.
        OutputError: the disk is full.
    """
    reader = source.tensors

    @lru_cache(maxsize=1)
    def attention(layer: int) -> dict[str, Tensor]:
        return source.mla_tensors(layer, layers[layer], config, config.dtype)

    layout: dict[str, Tensor] = {}
    converted: dict[str, int] = {}
    seen: set[int] = set()
    for name in source.stored_names():
        layer = source.replaced(name)
        if layer is None:
            layout[name] = torch.empty(reader.shape(name), dtype=cast or reader.dtype(name), device="meta")
        elif layer not in seen:
            seen.add(layer)
            layout |= {new: tensor.to("meta") for new, tensor in attention(layer).items()}
            converted |= dict.fromkeys(attention(layer), layer)

    def fetch(name: str) -> Tensor:
        if name in converted:
            return attention(converted[name])[name]
        return reader.tensor(name).to(layout[name].dtype)

    writer, finished = ShardWriter(work.checkpoint, layout), work.progress.shards
    with counting(progress, "writing", len(writer.files), len(finished)) as step:
        for file in writer.files:
            if file not in finished:
                writer.write(file, fetch)
                finished.append(file)
                work.save()
                step()
    writer.write_index()
