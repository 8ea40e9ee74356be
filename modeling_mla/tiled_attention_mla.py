"""Attention over latents in bounded memory: tiles of some tokens, merged by the online softmax.

A backend that reads tiles gives what it makes of them; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from .masks_mla import VisibleKeys
from .scores_mla import capped_and_masked
from .softmax_merge_mla import finite_lse, merge_attended


class Tile(Protocol):
    """Some tokens of one sequence, and all queries to it: m rows of r + d_r."""

    def scores(self) -> torch.Tensor:
        """``[m, T]``, in float32 or wider."""

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights [m, T]`` to ``[m, r]``."""


def attend_tiled(
    query: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    visible: VisibleKeys,
    softcap: float | None,
    tiles: Callable[[int, torch.Tensor], Iterable[tuple[slice, Tile]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`AbsorbedBackend.attend`, sequence by sequence. Scores and softmax are float32, or float64 where the query is.

    ``tiles`` makes the tiles, with their places, of a sequence's index and its queries ``[m, r + d_r]``, m = H * n.
    """
    batch, heads, length, width = query.shape
    rows = query.reshape(batch, heads * length, width)
    mask = visible.dense()
    if mask is not None:
        mask = mask.expand(batch, heads, length, -1).reshape(batch, heads * length, -1)
    parts = [
        _attend(tiles(index, rows[index]), scale, None if mask is None else mask[index], softcap)
        for index in range(batch)
    ]
    context, lse = parts[0] if batch == 1 else map(torch.stack, zip(*parts, strict=True))
    context = context.view(batch, heads, length, kv_lora_rank)
    return context.to(query.dtype), lse.view(batch, heads, length)


def _attend(
    tiles: Iterable[tuple[slice, Tile]], scale: float, mask: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The online softmax (Milakov and Gimelshein, arXiv 1805.02867); ``mask`` is ``[m, S]``."""
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for part, tile in tiles:
        scores = capped_and_masked(tile.scores() * scale, None if mask is None else mask[:, part], softcap)
        # Written out: PyTorch's logsumexp takes several times longer than all of this.
        top = finite_lse(scores.detach().amax(-1, keepdim=True))
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        lse = (total.log() + top).squeeze(-1)
        attended = tile.context(weights) / total.clamp(min=torch.finfo(total.dtype).tiny)
        merged = (attended, lse) if merged is None else merge_attended(*merged, attended, lse)
    assert merged is not None
    return merged
