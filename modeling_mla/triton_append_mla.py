"""Writing codes by one Triton kernel: scales, levels and packing of new tokens, straight into the rows of a cache.

In PyTorch these are some thirty operators, whose launches take longer than the attention of a decode step. It needs the
package triton, so `coded_layer_mla` imports it only where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .code_words_mla import code_plan
from .latent_code_mla import part_code
from .triton_decode_mla import NAMESPACE, on_device_of
from .triton_words_mla import (
    piece_count,
    piece_in_byte,
    piece_in_level,
    piece_mask,
    piece_run,
    scale_share,
    share_count,
    tile,
    tile_count,
    word,
    word_count,
)

_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: added to a float32 below 2 ** 22 and taken off again, it rounds to the nearest, ties to even."""


@triton.jit
def _load_tile(states, PLAN: tl.constexpr, t: tl.constexpr):
    column = tl.arange(0, tile(PLAN, t, "block"))
    channel = tile(PLAN, t, "first") + column * tile(PLAN, t, "step")
    return tl.load(states + channel, mask=column < tile(PLAN, t, "columns"), other=0.0).to(tl.float32)


@triton.jit
def _rounded_up(scale):
    """The bits of the next bfloat16 that is not below a positive float32."""
    return (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16


@triton.jit
def _step(scale):
    """The scale of these bits; where it is zero, all its states are."""
    return tl.maximum((scale << 16).to(tl.float32, bitcast=True), 1.1754943508222875e-38)


@triton.jit
def _scale(states, PLAN: tl.constexpr):
    """The scale of the least squared error, bits of a bfloat16: shares are tried of the one that cuts off no state."""
    largest = tl.zeros((), tl.float32)
    for t in tl.static_range(tile_count(PLAN)):
        own = tl.abs(_load_tile(states, PLAN, t))
        largest = tl.maximum(largest, tl.max(tl.div_rn(own, tl.full(own.shape, tile(PLAN, t, "limit"), tl.float32))))
    scale = _rounded_up(largest)
    if share_count(PLAN) > 1:
        error = _error(states, scale, PLAN)
        for index in tl.static_range(1, share_count(PLAN)):
            other = _rounded_up(largest * scale_share(PLAN, index))
            other_error = _error(states, other, PLAN)
            scale = tl.where(other_error < error, other, scale)
            error = tl.minimum(other_error, error)
    return scale


@triton.jit
def _error(states, scale, PLAN: tl.constexpr):
    """The squared error of the levels at a scale."""
    step, error = _step(scale), tl.zeros((), tl.float32)
    for t in tl.static_range(tile_count(PLAN)):
        own = _load_tile(states, PLAN, t)
        off = own - (_level(states, step, PLAN, t).to(tl.float32) - tile(PLAN, t, "middle")) * step
        inside = tl.arange(0, tile(PLAN, t, "block")) < tile(PLAN, t, "columns")
        error += tl.sum(tl.where(inside, off * off, 0.0))
    return error


@triton.jit
def _level(states, step, PLAN: tl.constexpr, t: tl.constexpr):
    """A tile's levels, int32; 0 beside them, as bytes that are not filled have it."""
    limit: tl.constexpr = tile(PLAN, t, "limit")
    middle: tl.constexpr = tile(PLAN, t, "middle")
    own = _load_tile(states, PLAN, t)
    level = (tl.div_rn(own, tl.zeros(own.shape, tl.float32) + step) + middle + _ROUNDER) - _ROUNDER
    inside = tl.arange(0, tile(PLAN, t, "block")) < tile(PLAN, t, "columns")
    return tl.where(inside, tl.minimum(tl.maximum(level, middle - limit), middle + limit), 0.0).to(tl.int32)


@triton.jit
def _store_run(states, row, step, PLAN: tl.constexpr, s: tl.constexpr, run: tl.constexpr):
    """The bytes of one run, from all levels of which a piece lies there."""
    byte = tl.arange(0, word(PLAN, s, "block"))
    packed = tl.zeros(byte.shape, tl.int32)
    for t in tl.static_range(tile_count(PLAN)):
        if tile(PLAN, t, "segment") == s:
            for index in tl.static_range(piece_count(PLAN, t)):
                if piece_run(PLAN, t, index) == run:
                    piece = _level(states, step, PLAN, t) & piece_mask(PLAN, t, index, 0)
                    packed |= piece >> piece_in_level(PLAN, t, index) << piece_in_byte(PLAN, t, index)
    inside = byte < word(PLAN, s, "words")
    place = row + (word(PLAN, s, "start") + run * word(PLAN, s, "words")) + byte
    tl.store(place, packed.to(tl.uint8), mask=inside)


@triton.jit
def _store_part(states, row, PLAN: tl.constexpr, SCALED: tl.constexpr, HALF: tl.constexpr):
    """One part of a token: its levels from ``row`` on, its scale before it."""
    if SCALED:
        scale = _scale(states, PLAN)
        tl.store(row.to(tl.pointer_type(tl.int16), bitcast=True) - 1, scale.to(tl.int16))
        step = _step(scale)
        for s in tl.static_range(word_count(PLAN)):
            for run in tl.static_range(word(PLAN, s, "runs")):
                _store_run(states, row, step, PLAN, s, run)
    elif tile_count(PLAN):
        number: tl.constexpr = tl.float16 if HALF else tl.bfloat16
        column = tl.arange(0, tile(PLAN, 0, "block"))
        place = row.to(tl.pointer_type(number), bitcast=True) + column
        tl.store(place, _load_tile(states, PLAN, 0).to(number), mask=column < tile(PLAN, 0, "columns"))


@triton.jit(do_not_specialize=["filled"])
def append_kernel(
    rotated, latent, rope, exact, starts, positions, filled,
    tokens, latent_b, latent_k, rope_b, rope_k, exact_b, exact_k,
    RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    LATENT_SCALED: tl.constexpr, ROPE_SCALED: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """One token: its codes, and itself among the first tokens if it is one of these."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = (filled + token).to(tl.int64)
    if POSITIONS:
        place = tl.load(positions + token)
    states = rotated + (batch * tokens + token) * WIDTH
    _store_part(states, latent + batch * latent_b + place * latent_k, LATENT, LATENT_SCALED, HALF)
    _store_part(states + RANK, rope + batch * rope_b + place * rope_k, ROPE, ROPE_SCALED, HALF)
    if EXACT:
        channel = tl.arange(0, BLOCK)
        slot = place - tl.load(starts + batch) + tl.zeros((BLOCK,), tl.int64)
        inside = (channel < WIDTH) & (slot >= 0) & (slot < EXACT)
        own = tl.load(states + channel, mask=channel < WIDTH, other=0.0)
        tl.store(exact + batch * exact_b + slot * exact_k + channel, own.to(exact.dtype.element_ty), mask=inside)


def append_codes(
    rotated: torch.Tensor,
    rows: torch.Tensor,
    exact: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor | None,
    filled: int,
    exact_tokens: int,
    latent_code: Sequence[int],
    rope_code: Sequence[int],
) -> None:
    """Codes new tokens into the rows of a cache, with one scale a token for each part.

    Args:
        rotated: ``[B, n, r + d_r]`` float32, bfloat16 or float16, as it is coded.
        rows: ``[B, S, code.nbytes]`` uint8, written in place; bytes are dense.
        exact: ``[B, e, r + d_r]`` of the model's type, written in place where a token is one of the first.
        starts: ``[B]`` int64, where each sequence begins in the cache.
        positions: ``[n]`` int64, where the tokens are written; None for ``filled`` and what follows.
        filled: see ``positions``.
        exact_tokens: tokens of a sequence that ``exact`` keeps, 0 where none of the new ones is.
        latent_code: channels and bits of every segment, one after another.
        rope_code: likewise.
    """
    rotated = rotated.contiguous()
    batch, tokens, width = rotated.shape
    latent_part, rope_part = part_code(latent_code), part_code(rope_code)
    latent = rows[..., latent_part.scale_bytes :]
    rope = rows[..., latent_part.nbytes + rope_part.scale_bytes :]
    with on_device_of(rotated):
        append_kernel[(tokens, batch)](
            rotated, latent, rope, exact, starts, positions, filled,
            tokens, *latent.stride()[:2], *rope.stride()[:2], *exact.stride()[:2],
            RANK=latent_part.channels, WIDTH=width, BLOCK=triton.next_power_of_2(width),
            LATENT=code_plan(latent_part, 1), ROPE=code_plan(rope_part, 1),
            LATENT_SCALED=not latent_part.is_exact, ROPE_SCALED=not rope_part.is_exact,
            HALF=exact.dtype == torch.float16, EXACT=exact_tokens, POSITIONS=positions is not None,
            num_warps=4,
        )  # fmt: skip


append_codes_operator = torch.library.custom_op(
    f"{NAMESPACE}::append_codes",
    append_codes,
    mutates_args=("rows", "exact"),
    schema="(Tensor rotated, Tensor(a!) rows, Tensor(b!) exact, Tensor starts, Tensor? positions, SymInt filled, "
    "int exact_tokens, int[] latent_code, int[] rope_code) -> ()",
)
"""`append_codes` as one operator of a compiled graph."""


@append_codes_operator.register_fake
def _(rotated, rows, exact, starts, positions, filled, exact_tokens, latent_code, rope_code):
    return None
