"""Absorbed attention over codes by products of bytes: decode on CPUs that have instructions for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .backend_base_mla import AbsorbedShape
from .coded_states_mla import Codec
from .fixed_point_mla import DIGITS, FixedPoint
from .latent_code_mla import LatentCode
from .latent_tiles_mla import CodedLatents, PlainTile
from .masks_mla import VisibleKeys
from .scores_mla import float32_products
from .tiled_attention_mla import Tile, attend_tiled

_SCORES = 1 << 16
"""Scores that are held at once for one sequence: large enough that the calls do not cost more than the work."""
_MIN_TOKENS, _MAX_TOKENS = 512, 4096
_MAX_ROWS = 256
"""Queries of all heads beyond which splitting them into digits costs more than converting the codes."""


class Int8Backend:
    """Multiplies levels as they are unpacked, without a conversion to floating point.

    Queries and attention weights are split into bytes, as many as their precision has; the products are exact. At 4
    bits this reads a cache faster than bfloat16 is read.
    """

    name = "int8"
    serves = (
        f"CPU with AVX512-VNNI; bfloat16, float16, float32; codes of one scale a token, at most {_MAX_ROWS} queries of "
        "all heads, any mask, no gradient"
    )

    def why_unavailable(self, device: torch.device) -> str | None:
        """None on a CPU that multiplies bytes, else the reason why not."""
        if device.type != "cpu":
            return f"it takes tensors on a CPU, not on {device.type}"
        if torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported():
            return None
        return "the processor has no instructions for products of bytes (AVX512-VNNI)"

    def supports(self, shape: AbsorbedShape) -> str | None:
        """None for few queries over codes, else the reason why not."""
        if shape.code is None:
            return "it takes coded latents only"
        if shape.dtype not in DIGITS:
            return f"it takes bfloat16, float16 and float32, not {shape.dtype}"
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "it has no gradient and is not compiled"
        if shape.num_heads * shape.query_length > _MAX_ROWS:
            return f"it takes at most {_MAX_ROWS} queries of all heads, not {shape.num_heads * shape.query_length}"
        return _why_not_of_bytes(shape.code)

    def attend(
        self,
        query: torch.Tensor,
        latents: torch.Tensor | CodedLatents,
        kv_lora_rank: int,
        scale: float,
        visible: VisibleKeys,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends to coded latents, as `AbsorbedBackend.attend` says, without decoding them."""
        assert isinstance(latents, CodedLatents)

        def tiles(index: int, rows: torch.Tensor) -> Iterator[tuple[slice, Tile]]:
            return _tiles(rows.float(), latents, index, kv_lora_rank, DIGITS[query.dtype])

        return attend_tiled(query, kv_lora_rank, scale, visible, softcap, tiles)


def _why_not_of_bytes(code: LatentCode) -> str | None:
    if code.latent.is_exact:
        return "the latents are kept in 16 bits"
    for name, part in (("latent", code.latent), ("rope", code.rope)):
        if len(part.groups) > 1:
            return f"it takes one scale a token, and the {name} code has {len(part.groups)}"
    return None


def _tiles(
    rows: torch.Tensor, latents: CodedLatents, index: int, kv_lora_rank: int, digits: int
) -> Iterator[tuple[slice, Tile]]:
    places, exact = latents.exact(index)
    if len(exact):
        yield places, PlainTile(rows, exact.float(), kv_lora_rank)
    tokens = min(max(_SCORES // len(rows), _MIN_TOKENS), _MAX_TOKENS)
    latent = _Levels(latents.latent.codec, rows[:, :kv_lora_rank], digits, tokens)
    rope_codec, rope_rows = latents.rope.codec, rows[:, kv_lora_rank:]
    rope = None if rope_codec.code.is_exact else _Levels(rope_codec, rope_rows, digits, tokens)
    for part, own, other in latents.pieces(index, tokens):
        scores = latent.scores(own)
        if rope is not None:
            scores.add_(rope.scores(other))
        elif len(rope_codec.code.segments):
            scores.add_(float32_products(rope_rows, other.view(rope_codec.exact_dtype).float().t()))
        yield part, _ByteTile(latent, scores)


class _Levels:
    """The levels of some tokens at a time, in one place, and the queries to them."""

    def __init__(self, codec: Codec, rows: torch.Tensor, digits: int, tokens: int) -> None:
        self.codec, self.digits = codec, digits
        self.queries = FixedPoint.of(rows, digits)
        self.middles = (rows @ codec.middles).unsqueeze(-1)
        self.place = rows.new_empty(tokens, rows.shape[1], dtype=torch.uint8)

    def scores(self, packed: torch.Tensor) -> torch.Tensor:
        """``packed [T, code.nbytes]`` to ``[m, T]``."""
        self.levels = self.codec.unpack(packed, self.place[: len(packed)])
        self.scales = self.codec.scales(packed)[:, 0].float()
        return self.queries.products(self.levels.t()).sub_(self.middles).mul_(self.scales)

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """``[m, T]`` to ``[m, n]``, of the tokens that were scored last."""
        fixed = FixedPoint.of(weights * self.scales, self.digits)
        return fixed.products(self.levels).sub_(torch.outer(fixed.sums, self.codec.middles))


class _ByteTile(NamedTuple):
    latent: _Levels
    own_scores: torch.Tensor

    def scores(self) -> torch.Tensor:
        return self.own_scores

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        return self.latent.context(weights)
