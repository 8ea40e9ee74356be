"""Cached latents, plain or coded, as a backend in PyTorch reads them: some tokens of one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .coded_states_mla import CodedStates
from .latent_code_mla import LatentCode
from .scores_mla import float32_products, weighted_sums
from .tiled_attention_mla import Tile

_CODED_TOKENS = 1024
"""Codes that are decoded at once: what they decode to must stay in a processor's cache until it is used."""


class CodedLatents(NamedTuple):
    """Stands for ``[B, S, r + d_r]``: latents beside rotary keys."""

    latent: CodedStates
    rope: CodedStates

    @property
    def shape(self) -> torch.Size:
        """``[B, S, r + d_r]``."""
        batch, _, length, rank = self.latent.shape
        return torch.Size((batch, length, rank + self.rope.shape[-1]))

    @property
    def code(self) -> LatentCode:
        """The code of both parts."""
        return LatentCode(self.latent.codec.code, self.rope.codec.code)

    def rotated_query(self, query: torch.Tensor) -> torch.Tensor:
        """``[..., r + d_r]`` as it is multiplied with what is in the codes."""
        latent, rope = query.split([self.latent.shape[-1], self.rope.shape[-1]], dim=-1)
        rotated = self.latent.codec.rotate(latent), self.rope.codec.rotate(rope)
        return torch.cat([part.to(query.dtype) for part in rotated], dim=-1)

    def context(self, rotated: torch.Tensor) -> torch.Tensor:
        """``[..., r]`` from what attention over the codes gives."""
        return self.latent.codec.rotate_back(rotated)

    def exact(self, index: int) -> tuple[slice, torch.Tensor]:
        """Where a sequence's exact tokens are, and ``[e, r + d_r]``."""
        places, own = self.latent.exact_places(index)
        return places, torch.cat((self.latent.exact[index, own], self.rope.exact[index, own]), dim=-1)

    def dense(self, start: int, length: int) -> torch.Tensor:
        """Some tokens of all sequences, ``[B, length, r + d_r]``, still rotated, in float32 or wider."""
        return torch.cat([part.narrow(2, start, length).rotated() for part in self], dim=-1)

    def pieces(self, index: int, tokens: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The other tokens, at most so many at once: their place, their rows of the latents and of the rotary keys."""
        exact, _ = self.latent.exact_places(index)
        for first, last in ((0, exact.start), (exact.stop, self.shape[1])):
            for start in range(first, last, tokens):
                part = slice(start, min(start + tokens, last))
                yield part, self.latent.rows[index, part], self.rope.rows[index, part]


def narrowed(latents: torch.Tensor | CodedLatents, length: int) -> torch.Tensor | CodedLatents:
    """The first ``length`` tokens."""
    if isinstance(latents, CodedLatents):
        return CodedLatents(*(part.narrow(2, 0, length) for part in latents))
    return latents[:, :length]


class PlainTile(NamedTuple):
    """``latents [T, r + d_r]`` for the queries ``rows [m, r + d_r]``."""

    rows: torch.Tensor
    latents: torch.Tensor
    kv_lora_rank: int

    def scores(self) -> torch.Tensor:
        """``[m, T]``, in float32 or wider."""
        return float32_products(self.rows, self.latents.t())

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights [m, T]`` to ``[m, r]``."""
        return weighted_sums(weights, self.latents[:, : self.kv_lora_rank])


class CodedTile(NamedTuple):
    """``latent [T, r]`` and ``rope [T, d_r]``, and what each token of either is to be multiplied with, ``[T]``.

    A token's factor multiplies its score and its weight, and is never spread over its channels.
    """

    rows: torch.Tensor
    latent: torch.Tensor
    latent_scales: torch.Tensor | None
    rope: torch.Tensor
    rope_scales: torch.Tensor | None

    def scores(self) -> torch.Tensor:
        """``[m, T]``, in float32 or wider, multiplied by the factors of the tokens."""
        latent_rows, rope_rows = self.rows.split([self.latent.shape[-1], self.rope.shape[-1]], dim=-1)
        scores = scaled(float32_products(latent_rows, self.latent.t()), self.latent_scales)
        if not self.rope.shape[-1]:
            return scores
        return scores + scaled(float32_products(rope_rows, self.rope.t()), self.rope_scales)

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights [m, T]`` to ``[m, r]``, still rotated where the code is."""
        return weighted_sums(scaled(weights, self.latent_scales), self.latent)


def scaled(by_token: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """``[m, T]`` times ``[T]``, where there are scales."""
    return by_token if scales is None else by_token * scales


def latent_tiles(
    rows: torch.Tensor, latents: torch.Tensor | CodedLatents, index: int, kv_lora_rank: int, tokens: int
) -> Iterator[tuple[slice, Tile]]:
    """Sequence ``index``, at most so many tokens at once, in the dtype of the queries ``rows [m, r + d_r]``."""
    if not isinstance(latents, CodedLatents):
        for start in range(0, max(latents.shape[1], 1), tokens):
            part = slice(start, min(start + tokens, latents.shape[1]))
            yield part, PlainTile(rows, latents[index, part].to(rows.dtype), kv_lora_rank)
        return
    places, exact = latents.exact(index)
    if len(exact):
        yield places, PlainTile(rows, exact.to(rows.dtype), kv_lora_rank)
    codecs = latents.latent.codec, latents.rope.codec
    for part, latent, rope in latents.pieces(index, min(tokens, _CODED_TOKENS)):
        yield part, CodedTile(rows, *codecs[0].tile(latent, rows.dtype), *codecs[1].tile(rope, rows.dtype))
