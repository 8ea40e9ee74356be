"""Attention over latents for accelerators, where a launch costs more than the work of a thousand tokens.

All sequences, heads and queries at once: as many operators for a batch of a hundred as for one, and none that waits for
the device.
"""

from __future__ import annotations

import torch

from .latent_tiles_mla import CodedLatents
from .masks_mla import VisibleKeys
from .scores_mla import capped_and_masked, float32_products
from .softmax_merge_mla import merge_attended

_SCORES = 1 << 28
"""Scores that are held at once, a gigabyte of them; beyond, the context is read in equal parts."""
_DECODED = 1 << 28
"""Channels that are decoded at once, another gigabyte."""


def attend_batched(
    query: torch.Tensor,
    latents: torch.Tensor | CodedLatents,
    kv_lora_rank: int,
    scale: float,
    visible: VisibleKeys,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`AbsorbedBackend.attend`; scores and softmax are float32, or float64 where the query is."""
    batch, heads, length, width = query.shape
    keys = latents.shape[1]
    rows = query.reshape(batch, heads * length, width)
    mask = visible.dense()
    parts = -(-batch * heads * length * keys // _SCORES)
    if isinstance(latents, CodedLatents):
        parts = max(parts, -(-batch * keys * width // _DECODED))
    size = -(-keys // max(parts, 1))
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, keys, size):
        count = min(size, keys - start)
        own = latents.dense(start, count) if isinstance(latents, CodedLatents) else latents[:, start : start + count]
        own_mask = None if mask is None else mask[..., start : start + count]
        scores = float32_products(rows, own.to(query.dtype).mT).view(batch, heads, length, count)
        scores = capped_and_masked(scores.mul_(scale), own_mask, softcap)
        lse = torch.logsumexp(scores, dim=-1)
        # Where nothing is visible every score is less than any number.
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).to(query.dtype)
        context = torch.bmm(weights.view(batch, heads * length, count), own[..., :kv_lora_rank].to(query.dtype))
        attended = context.view(batch, heads, length, kv_lora_rank), lse
        merged = attended if merged is None else merge_attended(*merged, *attended)
    assert merged is not None
    return merged[0].to(query.dtype), merged[1]
