"""What a conversion will take of time, memory and disk: estimates that are shown before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..forward.hidden_states import BLOCK
from ..forward.products import fast_float32
from ..forward.residual_stream import stream_dtype
from ..sources import SourceModel
from .text_use import VERIFIED_WINDOWS, TextUse

PROCESS_BYTES = 1100 * 10**6
"""The interpreter with PyTorch and Transformers, and what its allocator holds back."""
_WORK_OF_MEASURING = 1.7
"""Time of statistics and forward pass of a token, in units of the forward pass's products [measured]."""
_WORK_OF_REFITTING = 2.4
"""The same of a token that the refit uses [measured]."""
_FIXED_SECONDS = 40.0
"""Start, loading, weighing layers and writing [measured on a small model]."""


@dataclass(frozen=True)
class Costs:
    """``parameters`` are the source's; the others are estimates."""

    parameters: int
    disk_bytes: int
    memory_bytes: int
    seconds: float


def estimate_costs(source: SourceModel, dtype: torch.dtype, text: TextUse) -> Costs:
    """Costs of a conversion to weights of ``dtype``."""
    parameters = sum(tensor.numel() for tensor in source.meta_model.parameters())
    weights_bytes = parameters * dtype.itemsize
    return Costs(
        parameters=parameters,
        disk_bytes=int(1.5 * weights_bytes) + kept_bytes(source, text),
        memory_bytes=PROCESS_BYTES + layer_in_memory(source, text),
        seconds=_seconds(source, parameters, text),
    )


def block_bytes(source: SourceModel, text: TextUse) -> int:
    """One block of windows between two steps of a layer, in float32."""
    geometry = source.geometry(0)
    widest = max(geometry.hidden_size, geometry.num_heads * geometry.head_dim)
    return BLOCK * text.window * widest * torch.float32.itemsize


def kept_bytes(source: SourceModel, text: TextUse) -> int:
    """Bytes on the disk until layers are converted: hidden states and statistics of all, and what the refit keeps."""
    hidden = source.geometry(0).hidden_size
    states = text.windows * text.window * hidden * stream_dtype(source).itemsize
    statistics = text.passes * torch.float64.itemsize * (hidden + 1) ** 2 if text.windows else 0
    return source.num_layers * (states + statistics) + 3 * text.refitted * block_bytes(source, text) // BLOCK


def layer_in_memory(source: SourceModel, text: TextUse) -> int:
    """A layer and its products, some blocks of the text, and the embedding: while a layer is run."""
    sizes = {name: tensor.numel() for name, tensor in source.meta_model.state_dict().items()}
    layer = sum(size for name, size in sizes.items() if source.in_layer(name)) // source.num_layers
    return 8 * layer + 4 * block_bytes(source, text) + torch.float32.itemsize * sizes[source.embedding]


@fast_float32()
def _seconds(source: SourceModel, parameters: int, text: TextUse) -> float:
    """From this machine's speed at a matrix product: the passes over the text, and the verification."""
    side = 512
    matrix = torch.ones(side, side)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    rate = 4 * 2 * side**3 / (time.perf_counter() - start)
    attention = text.window * source.geometry(0).hidden_size * source.num_layers
    forward = 2 * (parameters + attention) / rate
    work = _WORK_OF_MEASURING * text.passes * text.windows + _WORK_OF_REFITTING * text.refitted
    return forward * text.window * (work + 2 * VERIFIED_WINDOWS) + _FIXED_SECONDS
