"""Cached latents, plain or coded, as a backend in PyTorch reads them: some tokens of one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .coded_states_mla import CodedStates, Tile
from .scores_mla import float32_products

_CODED_TOKENS = 1024
"""Tokens that are decoded at once: what they decode to must stay in a processor's cache until it is used."""


class CodedLatents(NamedTuple):
    """Stands for ``[B, S, r + d_r]``: latents beside rotary keys."""

    latent: CodedStates
    rope: CodedStates

    @property
    def shape(self) -> torch.Size:
        batch, _, length, rank = self.latent.shape
        return torch.Size((batch, length, rank + self.rope.shape[-1]))

    def rotated_query(self, query: torch.Tensor) -> torch.Tensor:
        """``[..., r + d_r]`` as it is multiplied with what is in the codes."""
        latent, rope = query.split([self.latent.shape[-1], self.rope.shape[-1]], dim=-1)
        rotated = self.latent.codec.rotate(latent), self.rope.codec.rotate(rope)
        return torch.cat([part.to(query.dtype) for part in rotated], dim=-1)

    def context(self, rotated: torch.Tensor) -> torch.Tensor:
        """``[..., r]`` from what attention over the codes gives."""
        return self.latent.codec.rotate_back(rotated)


class PlainTile(NamedTuple):
    """``[T, r + d_r]``."""

    latents: torch.Tensor
    kv_lora_rank: int

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """``[m, r + d_r] -> [m, T]``, in float32 or wider."""
        return float32_products(rows, self.latents.t())

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """``[m, T] -> [m, r]``."""
        return torch.mm(weights.to(self.latents.dtype), self.latents[:, : self.kv_lora_rank])


class CodedTile(NamedTuple):
    """The same of codes."""

    latent: Tile
    rope: Tile

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        rank = self.latent.levels.shape[-1]
        scores = self.latent.scores(rows[:, :rank])
        return scores + self.rope.scores(rows[:, rank:]) if rank < rows.shape[1] else scores

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        return self.latent.context(weights)


def narrowed(latents: torch.Tensor | CodedLatents, length: int) -> torch.Tensor | CodedLatents:
    """The first ``length`` tokens."""
    if isinstance(latents, CodedLatents):
        return CodedLatents(*(part.narrow(2, 0, length) for part in latents))
    return latents[:, :length]


def latent_tiles(
    latents: torch.Tensor | CodedLatents, index: int, kv_lora_rank: int, dtype: torch.dtype, tokens: int
) -> Iterator[tuple[slice, PlainTile | CodedTile]]:
    """Sequence ``index`` in pieces of at most ``tokens`` tokens, as numbers of ``dtype``, with their places."""
    if not isinstance(latents, CodedLatents):
        for start in range(0, max(latents.shape[1], 1), tokens):
            part = slice(start, min(start + tokens, latents.shape[1]))
            yield part, PlainTile(latents[index, part].to(dtype), kv_lora_rank)
        return
    exact = latents.latent.exact.shape[1]
    if exact:
        both = torch.cat((latents.latent.exact[index], latents.rope.exact[index]), dim=-1)
        yield slice(0, exact), PlainTile(both.to(dtype), kv_lora_rank)
    tokens = min(tokens, _CODED_TOKENS)
    for start in range(exact, latents.shape[1], tokens):
        part = slice(start, min(start + tokens, latents.shape[1]))
        yield part, CodedTile(*(states.codec.tile(states.rows[index, part], dtype) for states in latents))
