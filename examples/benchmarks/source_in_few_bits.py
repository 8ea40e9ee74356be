"""The source's own cache in few bits, which a user would try before converting: KIVI's form and Transformers' own.

KIVI (arXiv 2402.02750, section 3): keys by channel over `GROUP` tokens, values by token over `GROUP` channels, levels
between the least and the largest of a group, both kept in 16 bits. A group of tokens is coded when it is full, so a
query reads its own as it is. The first tokens, whose keys are many times larger than all others, are kept besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, QuantizedCache
from transformers.masking_utils import sdpa_mask

from conversion.evaluation.scores import perplexity

GROUP = 32
EXACT_TOKENS = 4
KIVI_BITS = (4, 3, 2)
QUANTO_BITS = (4, 2)
_RESIDUAL = 128
"""Tokens that Transformers' cache keeps as they are by default. What is coded is read by what comes later, so a window
is read so many at a time."""
_QUANTO_GROUP = 64
_SCALE_AND_OFFSET = 4
"""Bytes of a group."""


def rounded(states: Tensor, bits: int, dim: int) -> Tensor:
    """``states`` as groups of `GROUP` along ``dim`` give them back; what fills no group stays as it is."""
    states = states.movedim(dim, -1)
    whole = states.shape[-1] // GROUP * GROUP
    groups = states[..., :whole].unflatten(-1, (-1, GROUP))
    least = groups.amin(-1, keepdim=True).bfloat16().to(groups)
    step = ((groups.amax(-1, keepdim=True) - least) / (2**bits - 1)).bfloat16().to(groups).clamp_min(1e-12)
    levels = ((groups - least) / step).round().clamp(0, 2**bits - 1)
    read = torch.cat(((levels * step + least).flatten(-2), states[..., whole:]), dim=-1)
    return read.movedim(-1, dim)


def kivi_attention(bits: int) -> Callable[..., tuple[Tensor, None]]:
    """An attention function over windows that start at position 0, whose keys and values went through the cache."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        length, groups = key.shape[2], query.shape[1] // key.shape[1]
        first = torch.arange(length, device=key.device) < EXACT_TOKENS
        # The first tokens would widen every group that they are in.
        held = torch.where(first[:, None], key[..., EXACT_TOKENS : EXACT_TOKENS + 1, :], key)
        coded_key = torch.where(first[:, None], key, rounded(held, bits, dim=-2))
        coded_value = torch.where(first[:, None], value, rounded(value, bits, dim=-1))
        block = torch.arange(length, device=key.device) // GROUP
        own = block[:, None] == block
        later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
        key, value, coded_key, coded_value = (
            states.repeat_interleave(groups, dim=1) for states in (key, value, coded_key, coded_value)
        )
        scores = torch.where(own, query @ key.mT, query @ coded_key.mT) * scaling
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        output = weights.where(own, 0) @ value + weights.where(~own, 0) @ coded_value
        return output.transpose(1, 2).contiguous(), None

    return attend


def kivi_share(bits: int, tokens: int) -> float:
    """Of the bytes of a cache of ``tokens`` in bfloat16, the first ones included."""
    return (bits + 8 * _SCALE_AND_OFFSET / GROUP) / 16 + EXACT_TOKENS / tokens


def kivi_perplexity(model: PreTrainedModel, windows: Tensor, bits: int, step: Callable[[], None]) -> float:
    """Of windows ``[N, S]`` read through KIVI's form of the cache."""
    name = f"kivi-{bits}"
    AttentionInterface.register(name, kivi_attention(bits))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        return perplexity(model, windows, step)
    finally:
        model.set_attn_implementation(before)


def quanto_share(bits: int) -> float:
    """Of the bytes of a cache in bfloat16, when all its tokens are coded."""
    return (bits + 8 * _SCALE_AND_OFFSET / _QUANTO_GROUP) / 16


@torch.inference_mode()
def quanto_perplexity(model: PreTrainedModel, windows: Tensor, bits: int, step: Callable[[], None]) -> float:
    """Of windows ``[N, S]`` read through Transformers' `QuantizedCache`, which needs optimum-quanto."""
    total = 0.0
    for window in windows.to(model.device):
        cache = QuantizedCache(
            "quanto", model.config, nbits=bits, q_group_size=_QUANTO_GROUP, residual_length=_RESIDUAL
        )
        logits = torch.cat([model(chunk[None], past_key_values=cache).logits[0] for chunk in window.split(_RESIDUAL)])
        total += float(torch.nn.functional.cross_entropy(logits[:-1].float(), window[1:], reduction="sum"))
        step()
    return float(torch.tensor(total / (len(windows) * (windows.shape[1] - 1))).exp())
