"""The source's own cache in few bits as Transformers quantises it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache

from modeling_mla.transformers_seams_mla import cache_argument

QUANTO_BITS = (4, 2)
_RESIDUAL = 128
"""Tokens that Transformers' cache keeps as they are by default. What is coded is read by what comes later, so a window
is read so many at a time."""
_GROUP = 64
_SCALE_AND_OFFSET = 4
"""Bytes of a group."""


def quanto_share(bits: int) -> float:
    """Of the bytes of a cache in bfloat16, when all its tokens are coded."""
    return (bits + 8 * _SCALE_AND_OFFSET / _GROUP) / 16


@torch.inference_mode()
def quanto_perplexity(model: PreTrainedModel, windows: Tensor, bits: int, step: Callable[[], None]) -> float:
    """Of windows ``[N, S]`` read through Transformers' `QuantizedCache`, which needs optimum-quanto."""
    total = 0.0
    for window in windows.to(model.device):
        cache = QuantizedCache("quanto", model.config, nbits=bits, q_group_size=_GROUP, residual_length=_RESIDUAL)
        logits = torch.cat([model(chunk[None], **cache_argument(cache)).logits[0] for chunk in window.split(_RESIDUAL)])
        total += float(torch.nn.functional.cross_entropy(logits[:-1].float(), window[1:], reduction="sum"))
        step()
    return float(torch.tensor(total / (len(windows) * (windows.shape[1] - 1))).exp())
