"""Absorbed decode over coded latents by the Triton kernels, and the operator that PyTorch sees of it.

It needs the package triton, so `backend_triton_mla` imports it only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .code_words_mla import CodePlan, code_plan
from .latent_code_mla import part_code
from .triton_coded_kernels_mla import coded_partial_kernel
from .triton_decode_mla import NAMESPACE, Keys, Tile, Work, attend_in_splits, device_properties, outputs


def coded_tile_for(rows: int, dtype: torch.dtype, latent: CodePlan, capability: tuple[int, int]) -> Tile:
    """The tile for a sequence of ``rows`` queries of all heads, over latents of this plan.

    Words are loaded into registers one tile ahead, so there is no pipeline of loads, and shared memory holds one
    unpacked tile. The words of 64 tokens fit beside what they are added to where they are long and their levels short.
    Before compute capability 9 those of 32 do not fit either. The figures were tuned on an H100.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    if rows > 16:
        return Tile(32, 32, 4, 1)
    if capability < (9, 0):
        return Tile(16, 16, 4, 1)
    short = all(words.size == 4 for words in latent.words) and all(tile.bits <= 4 for tile in latent.tiles)
    return Tile(16, 64, 4, 1) if short else Tile(16, 32, 4, 1)


def coded_decode(
    query: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    exact: torch.Tensor,
    exact_rope: torch.Tensor,
    places: torch.Tensor,
    latent_code: Sequence[int],
    rope_code: Sequence[int],
    mask: torch.Tensor | None,
    first_query: int | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode`, over codes with one scale a token.

    Args:
        query: ``[B, H, n, r + d_r]``, rotated as what is in the codes.
        latent: ``[B, S, bytes]`` uint8, dense bytes at even places.
        rope: ``[B, S, bytes]``, likewise.
        exact: ``[B, e, r]`` of the query's type: tokens as they are.
        exact_rope: ``[B, e, d_r]``, likewise.
        places: ``[B]`` int64, where in the sequence the first of these is.
        latent_code: channels and bits of every segment, one after another.
        rope_code: likewise.
        mask: as of `Keys`, like the next two.
        first_query: see there.
        window: see there.
        scale: of the scores.
        softcap: see `decode`.
    """
    query = query.contiguous()
    latent_part, rope_part = part_code(latent_code), part_code(rope_code)
    latent, rope = latent[..., latent_part.scale_bytes :], rope[..., rope_part.scale_bytes :]
    constants = {
        "RANK": latent_part.channels, "WIDTH": query.shape[-1],
        "LATENT": code_plan(latent_part, _alignment(latent)), "ROPE": code_plan(rope_part, _alignment(rope)),
        "LATENT_SCALED": not latent_part.is_exact, "ROPE_SCALED": not rope_part.is_exact,
        "HALF": query.dtype == torch.float16, "EXACT": exact.shape[1],
    }  # fmt: skip

    def launch(grid: tuple[int, ...], work: Work, **shared) -> None:
        strides = (stride for tensor in (latent, rope, exact, exact_rope) for stride in tensor.stride()[:2])
        coded_partial_kernel[grid](
            query, latent, rope, exact, exact_rope, places, *work.tensors, *work.numbers, *strides, *work.strides,
            **constants, **shared,
        )  # fmt: skip

    hidden = Keys(mask, first_query, window)
    plan, capability = code_plan(latent_part, _alignment(latent)), device_properties(query.device)[1]
    tile = coded_tile_for(query.shape[1] * query.shape[2], query.dtype, plan, capability)
    return attend_in_splits(query, latent.shape[1], hidden, latent_part.channels, scale, softcap, tile, launch)


def _alignment(levels: torch.Tensor) -> int:
    """The largest power of two up to 16 of which the places of all tokens' levels are multiples."""
    return math.gcd(16, levels.data_ptr(), *levels.stride()[:2])


absorbed_coded_decode = torch.library.custom_op(
    f"{NAMESPACE}::absorbed_coded_decode",
    coded_decode,
    mutates_args=(),
    schema="(Tensor query, Tensor latent, Tensor rope, Tensor exact, Tensor exact_rope, Tensor places, "
    "int[] latent_code, int[] rope_code, Tensor? mask, SymInt? first_query, SymInt? window, float scale, "
    "float? softcap) -> (Tensor, Tensor)",
)
"""`coded_decode` as one operator of a compiled graph."""


@absorbed_coded_decode.register_fake
def _(
    query, latent, rope, exact, exact_rope, places, latent_code, rope_code, mask, first_query, window, scale, softcap
):
    return outputs(query, part_code(latent_code).channels)
