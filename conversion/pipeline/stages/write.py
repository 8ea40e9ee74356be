"""Writes the checkpoint: the converted attention, every other tensor of the source bit for bit, and the small files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...checkpoint.writer import ShardWriter
from ...layers import MLAWeights
from ...progress import counting
from ..job import ConversionJob
from ..lazy_layers import LazyLayers
from ..runner import in_first


@in_first
def write(job: ConversionJob) -> None:
    """Leaves all that Transformers loads in the work folder's checkpoint.

    Raises:
        VerificationError: a tensor is not finite or not read back as it was written.
        OutputError: the disk is full.
    """
    source, folder = job.source, job.work.checkpoint
    layers = LazyLayers(source.num_layers, job.work.read_layer)
    config = source.mla_config(layers, job.plan.dtype)
    write_shards(job, layers, config)
    config.save_pretrained(folder)
    source.location.generation_config(source.config).save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)


def write_shards(job: ConversionJob, layers: Sequence[MLAWeights], config: PreTrainedConfig) -> None:
    """Writes the weights; shards that the journal names are there already."""
    source, cast, work = job.source, job.plan.recipe.torch_dtype, job.work
    reader = source.tensors

    @lru_cache(maxsize=1)
    def attention(layer: int) -> dict[str, Tensor]:
        return source.mla_tensors(layer, layers[layer], config, config.dtype)

    def written(name: str) -> torch.dtype:
        stored = reader.dtype(name)
        return cast if cast is not None and stored.is_floating_point else stored

    layout: dict[str, Tensor] = {}
    converted: dict[str, int] = {}
    seen: set[int] = set()
    for name in source.stored_names():
        layer = source.replaced(name)
        if layer is None:
            layout[name] = torch.empty(reader.shape(name), dtype=written(name), device="meta")
        elif layer not in seen:
            seen.add(layer)
            layout |= {new: tensor.to("meta") for new, tensor in attention(layer).items()}
            converted |= dict.fromkeys(attention(layer), layer)

    def fetch(name: str) -> Iterable[Tensor]:
        if name in converted:
            return [attention(converted[name])[name].flatten()]
        return (piece.to(layout[name].dtype) for piece in reader.pieces(name))

    writer = ShardWriter(work.checkpoint, layout, job.plan.recipe.shard_size)
    finished = work.journal.shards
    with counting(job.progress, "writing", len(writer.files), len(finished)) as step:
        for file in writer.files:
            if file not in finished:
                writer.write(file, fetch)
                finished.append(file)
                work.save()
                step()
    writer.write_index()
