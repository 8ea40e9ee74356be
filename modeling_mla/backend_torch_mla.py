"""Absorbed attention in plain PyTorch: the reference for every kernel, and the fast form on a CPU."""

from __future__ import annotations

import torch

from .backend_base_mla import AbsorbedShape
from .masks_mla import VisibleKeys
from .scores_mla import capped_and_masked, float32_products
from .softmax_merge_mla import finite_lse, merge_attended

_BLOCK_SCORES = 1 << 18
"""Scores that are held at once for one sequence: more leave a processor's caches and take memory."""
_MIN_BLOCK = 1024


class TorchBackend:
    """Runs everywhere, at every shape and precision.

    All heads read one latent head, so they are rows of one query matrix, and a sequence is two matrix products over
    its latents where they lie: batched products and attention with repeated heads would copy the cache.
    """

    name = "torch"

    def supports(self, shape: AbsorbedShape) -> str | None:
        return None

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AbsorbedBackend.attend`. Scores and softmax are float32, or float64 where the query is."""
        batch, heads, length, width = query.shape
        context = query.new_empty(batch, heads, length, kv_lora_rank)
        lse = query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
        mask = visible.dense()
        mask = None if mask is None else mask.expand(batch, heads, length, -1)
        for index in range(batch):
            rows = query[index].reshape(heads * length, width)
            own_mask = None if mask is None else mask[index]
            attend = _attend_block if latents.shape[1] <= _block_length(rows) else _attend_blocks
            attended, own_lse = attend(rows, latents[index], kv_lora_rank, scale, own_mask, softcap)
            context[index] = attended.view(heads, length, kv_lora_rank)
            lse[index] = own_lse.view(heads, length)
        return context, lse


def _widens(tensor: torch.Tensor) -> bool:
    """Whether products are taken in float32: few processors multiply in float16, and PyTorch's loop for the others is
    several times slower than with a copy of the latents.
    """
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _block_length(rows: torch.Tensor) -> int:
    """Keys that are taken at once by ``rows [m, r + d_r]``."""
    return _MIN_BLOCK if _widens(rows) else max(_BLOCK_SCORES // rows.shape[0], _MIN_BLOCK)


def _attend_block(
    rows: torch.Tensor,
    latents: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores of one sequence at once: ``rows [H*n, r + d_r]``, ``latents [S, r + d_r]``, ``mask [H, n, S]``."""
    if _widens(rows):
        rows, latents = rows.float(), latents.float()
    mask = None if mask is None else mask.reshape(rows.shape[0], -1)
    scores = capped_and_masked(float32_products(rows, latents.t()) * scale, mask, softcap)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
    return torch.mm(weights.to(rows.dtype), latents[:, :kv_lora_rank]), lse


def _attend_blocks(
    rows: torch.Tensor,
    latents: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same block by block, by the online softmax (Milakov and Gimelshein, arXiv 1805.02867), in bounded memory."""
    precision = torch.promote_types(rows.dtype, torch.float32)
    block = _block_length(rows)
    context = rows.new_zeros(rows.shape[0], kv_lora_rank, dtype=precision)
    lse = rows.new_full((rows.shape[0],), float("-inf"), dtype=precision)
    for start in range(0, latents.shape[0], block):
        part = slice(start, start + block)
        own_mask = None if mask is None else mask[..., part]
        attended, own_lse = _attend_block(rows, latents[part], kv_lora_rank, scale, own_mask, softcap)
        context, lse = merge_attended(context, lse, attended.to(precision), own_lse)
    return context.to(rows.dtype), lse
