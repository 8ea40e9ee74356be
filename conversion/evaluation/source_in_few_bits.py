"""The source's own cache in few bits, which a user would try before converting, in KIVI's form.

KIVI (arXiv 2402.02750, section 3): keys by channel over `GROUP` tokens, values by token over `GROUP` channels, levels
between the least and the largest of a group, both kept in 16 bits. A group of tokens is coded when it is full, so a
query reads its own as it is. The first tokens, whose keys are many times larger than all others, are kept besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..forward.products import fast_float32
from .scores import ROWS, Score, Scores

GROUP = 32
EXACT_TOKENS = 4
KIVI_BITS = (4, 3, 2)
_SCALE_AND_OFFSET = 4
"""Bytes of a group."""
_SOURCE_BITS = 16
"""Of a value in the cache that it is compared with."""


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
    """An attention function over windows that start at position 0, whose keys and values went through the cache.

    It knows masks with windows, softcaps and sinks, as families of `conversion.sources` have them.
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        kv_heads, length = key.shape[1:3]
        place = torch.arange(length, device=key.device)
        first = (place < EXACT_TOKENS)[:, None]
        # The first tokens would widen every group that they are in.
        held = torch.where(first, key[..., EXACT_TOKENS : EXACT_TOKENS + 1, :], key)
        coded_key = torch.where(first, key, rounded(held, bits, dim=-2))
        coded_value = torch.where(first, value, rounded(value, bits, dim=-1))
        outputs = []
        # As many queries as share what is coded: scores of all at once would be many times the model's own memory.
        for start in range(0, length, GROUP):
            end = min(start + GROUP, length)
            read_key = torch.cat((coded_key[:, :, :start], key[:, :, start:end]), dim=2)
            read_value = torch.cat((coded_value[:, :, :start], value[:, :, start:end]), dim=2)
            queries = query[:, :, start:end].unflatten(1, (kv_heads, -1))
            scores = queries @ read_key.mT[:, :, None] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            # Where a mask would be the plain causal one, Transformers makes none.
            visible = place[start:end, None] >= place[:end]
            if attention_mask is not None:
                visible = attention_mask[:, :, None, start:end, :end]
            scores = scores.masked_fill(~visible, float("-inf"))
            if s_aux is not None:
                sinks = s_aux.view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
                scores = torch.cat((scores, sinks), dim=-1)
            outputs.append((scores.softmax(-1)[..., :end] @ read_value[:, :, None]).flatten(1, 2))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    return attend


def kivi_share(bits: int, tokens: int) -> float:
    """Of the bytes of a cache of ``tokens`` in bfloat16, the first ones included."""
    return (bits + 8 * _SCALE_AND_OFFSET / GROUP) / _SOURCE_BITS + EXACT_TOKENS / tokens


@contextmanager
def reading_in_few_bits(model: PreTrainedModel, bits: int) -> Iterator[None]:
    """Within it the model reads windows through KIVI's form of its cache."""
    name = f"kivi-{bits}"
    AttentionInterface.register(name, kivi_attention(bits))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@fast_float32()
@torch.inference_mode()
def score_in_few_bits(model: PreTrainedModel, windows: Tensor, text: str, step: Callable[[], None]) -> dict[int, Score]:
    """By bits of `KIVI_BITS`, the model that reads its cache so beside itself.

    Args:
        model: with keys and values, in float32.
        windows: token ids ``[N, S]``.
        text: names them.
        step: called after each window.
    """
    scores = {bits: Scores() for bits in KIVI_BITS}
    for window in windows.to(model.device):
        expected = _logits(model, window)
        for bits, score in scores.items():
            with reading_in_few_bits(model, bits):
                found = _logits(model, window)
            for rows in torch.arange(len(found), device=found.device).split(ROWS):
                score.add(expected[rows], found[rows], window[1:][rows])
        step()
    return {bits: score.result(text, *windows.shape) for bits, score in scores.items()}


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(window[None], use_cache=False).logits[0, :-1].float()
