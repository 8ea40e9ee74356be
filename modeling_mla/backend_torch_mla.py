"""Absorbed attention in plain PyTorch: the reference for every kernel, and the fast form on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .backend_base_mla import AbsorbedShape
from .latent_tiles_mla import CodedLatents, CodedTile, PlainTile, latent_tiles
from .masks_mla import VisibleKeys
from .scores_mla import capped_and_masked
from .softmax_merge_mla import finite_lse, merge_attended

_BLOCK_SCORES = 1 << 18
"""Scores that are held at once for one sequence: more leave a processor's caches and take memory."""
_MIN_BLOCK = 1024


class TorchBackend:
    """Runs everywhere, at every shape and precision, over plain and coded latents.

    All heads read one latent head, so they are rows of one query matrix, and a sequence is two matrix products over
    its latents where they lie: batched products and attention with repeated heads would copy the cache.
    """

    name = "torch"

    def supports(self, shape: AbsorbedShape) -> str | None:
        return None

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
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
            block = _MIN_BLOCK if _widens(rows) else max(_BLOCK_SCORES // rows.shape[0], _MIN_BLOCK)
            rows = rows.float() if _widens(rows) else rows
            tiles = latent_tiles(latents, index, kv_lora_rank, rows.dtype, block)
            attended, own_lse = _attend_tiles(rows, tiles, scale, None if mask is None else mask[index], softcap)
            context[index] = attended.view(heads, length, kv_lora_rank)
            lse[index] = own_lse.view(heads, length)
        return context, lse


def _widens(tensor: torch.Tensor) -> bool:
    """Whether products are taken in float32: few processors multiply in float16, and PyTorch's loop for the others is
    several times slower than with a copy of the latents."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _attend_tiles(
    rows: torch.Tensor,
    tiles: Iterable[tuple[slice, PlainTile | CodedTile]],
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [H*n, r + d_r]`` to one sequence, tile by tile in bounded memory: the online softmax (Milakov and
    Gimelshein, arXiv 1805.02867). ``mask`` is ``[H, n, S]``."""
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for part, tile in tiles:
        attended, lse = _attend_tile(rows, tile, scale, None if mask is None else mask[..., part], softcap)
        merged = (
            (attended, lse) if merged is None else merge_attended(merged[0].to(lse.dtype), merged[1], attended, lse)
        )
    assert merged is not None
    return merged


def _attend_tile(
    rows: torch.Tensor, tile: PlainTile | CodedTile, scale: float, mask: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores of some tokens at once."""
    mask = None if mask is None else mask.reshape(rows.shape[0], -1)
    scores = capped_and_masked(tile.scores(rows) * scale, mask, softcap)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - finite_lse(lse).unsqueeze(-1))
    return tile.context(weights), lse
