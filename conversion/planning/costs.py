"""What a conversion will take of time, memory and disk: estimates that are shown before it begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.filesize import decimal
from typing_extensions import override

from ..forward.hidden_states import BLOCK
from ..forward.residual_stream import stream_dtype
from ..sources import SourceModel
from .probe import Speed, measure_speed
from .text_use import WEIGHED_LENGTH, WEIGHED_WINDOWS, TextUse

PROCESS_BYTES = 1100 * 10**6
"""The interpreter with PyTorch and Transformers, and what its allocator holds back."""
WHOLE_MODEL_BYTES = 2 * 10**9
"""A model that takes no more in float32 is loaded whole by the verification."""
_WORK_OF_MEASURING = 2.1
"""Time of statistics and forward pass of a token, in units of the forward pass's products [measured]."""
_WORK_OF_REFITTING = 2.9
"""The same of a token that the refit uses [measured]."""
_WEIGHED = 2
"""How often more a layer's keys and values are decomposed, to be weighed and to be given a rank."""
_RIDGE = 0.15
"""Time of a refit's linear equations, in units of the eigenvalues of a matrix as large [measured]."""
_WORK_OF_LOGITS = 1.5
"""Time of a token's logits in either model and of comparing them, in units of the products [measured]."""
_VERIFIED_WINDOWS = 10
"""Two of each of five texts are the least that are as many as the stage asks for."""
_READINGS = 10
"""How often weights are read or written: to be checked, by each stage that runs layers, and to be verified."""
_FIXED_SECONDS = 20.0
"""Start, text and small files [measured]."""


@dataclass(frozen=True)
class Costs:
    """Of a conversion: what it is expected to take, or what it took."""

    seconds: float
    memory_bytes: int
    disk_bytes: int

    @override
    def __str__(self) -> str:
        memory, disk = decimal(self.memory_bytes), decimal(self.disk_bytes)
        return f"{self.seconds:.0f} s, {memory} of memory, {disk} of disk"


def count_parameters(source: SourceModel) -> int:
    """The source's."""
    return sum(tensor.numel() for tensor in source.meta_model.parameters())


def estimate_costs(
    source: SourceModel, dtype: torch.dtype, text: TextUse, device: torch.device, *, weighed: bool
) -> Costs:
    """Costs of a conversion to weights of ``dtype``, the time by the speed of ``device``.

    ``weighed`` says that ranks are moved between layers, for which the model's sensitivity to each is measured.
    """
    weights_bytes = count_parameters(source) * dtype.itemsize
    speed = measure_speed(device, source.location.folder)
    reading = _READINGS * weights_bytes / speed.reading if speed.reading else 0.0
    return Costs(
        seconds=_FIXED_SECONDS + reading + _computing(source, text, speed, weighed=weighed),
        memory_bytes=PROCESS_BYTES + max(layer_in_memory(source, dtype, text), _whole_model(source)),
        disk_bytes=int(1.5 * weights_bytes) + kept_bytes(source, text),
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


def layer_in_memory(source: SourceModel, dtype: torch.dtype, text: TextUse) -> int:
    """Two layers in float32, one of either model or one and what it is made from, and what is greater beside them.

    That is some blocks of the text with the moments of a refit, or the head as Transformers loads it to be compared: in
    its file, as it is stored, and in float32. That is more than the heads of both models as they are stored.
    """
    geometry = source.geometry(0)
    contexts = geometry.num_heads * geometry.head_dim + 1
    moments = 3 * torch.float64.itemsize * contexts * (contexts + geometry.hidden_size) if text.windows else 0
    head = (2 * dtype.itemsize + torch.float32.itemsize) * _head(source)
    return 2 * torch.float32.itemsize * _layer(source) + max(4 * block_bytes(source, text) + moments, head)


def _whole_model(source: SourceModel) -> int:
    # The heads of what it becomes have more channels than its own.
    size = 3 * torch.float32.itemsize * count_parameters(source) // 2
    return size if size <= WHOLE_MODEL_BYTES else 0


def _layer(source: SourceModel) -> int:
    """Parameters of a layer, on average."""
    parameters = source.meta_model.state_dict()
    return sum(tensor.numel() for name, tensor in parameters.items() if source.in_layer(name)) // source.num_layers


def _head(source: SourceModel) -> int:
    """Parameters of what makes logits."""
    return source.meta_model.state_dict()[source.embedding].numel()


def _computing(source: SourceModel, text: TextUse, speed: Speed, *, weighed: bool) -> float:
    """Seconds of the passes over the text, the verification, and the factorisations."""
    layers, layer, head, geometry = source.num_layers, _layer(source), _head(source), source.geometry(0)
    contexts = geometry.num_heads * geometry.head_dim
    of_token = 2 * layer + 2 * text.window * contexts
    calibrated = _WORK_OF_MEASURING * text.passes * text.windows + _WORK_OF_REFITTING * text.refitted
    verified = 2 * _VERIFIED_WINDOWS * (layers * of_token + _WORK_OF_LOGITS * 2 * head)
    work = text.window * (calibrated * layers * of_token + verified)
    if not text.windows:
        return work / speed.products
    decompositions = 1
    if weighed:
        # Each layer's own model runs from there on.
        work += WEIGHED_WINDOWS * WEIGHED_LENGTH * (layers + 1) * (layers / 2 * of_token + 2 * head)
        decompositions += _WEIGHED
    solved = layers * (decompositions * geometry.cache_elements**3 + _RIDGE * contexts**3)
    return work / speed.products + solved * speed.solving
