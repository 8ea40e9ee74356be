"""The Triton kernel of absorbed decode over coded latents, which are unpacked in registers and never in memory.

Imported only where it is used: by `triton_decode_mla`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels_mla import divisor_and_lse, share_of_keys, softmax_step, visible_scores
from .triton_words_mla import channels_of, load_scales, load_words, tile, tile_count, unpacked

_EXACT_KEYS = tl.constexpr(16)


@triton.jit
def _load_rows(rows, inside, PLAN: tl.constexpr, DTYPE: tl.constexpr):
    """Of every tile ``[n, block]``, from rows of channels that ``rows [n, 1]`` points to."""
    loaded = ()
    for t in tl.static_range(tile_count(PLAN)):
        channel, channel_in = channels_of(PLAN, t)
        own = tl.load(rows + channel[None, :], mask=inside[:, None] & channel_in[None, :], other=0.0)
        loaded += (own.to(DTYPE),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _unpack(words, PLAN: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    tiles = ()
    for t in tl.static_range(tile_count(PLAN)):
        tiles += (unpacked(words, PLAN, t, DTYPE, HALF),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _products(queries, tiles, scores, PLAN: tl.constexpr):
    """``[rows, keys]``, summed over the tiles, beside what ``scores`` are already."""
    for t in tl.static_range(tile_count(PLAN)):
        scores = tl.dot(queries[t], tl.trans(tiles[t]), scores, input_precision="ieee")
    return scores


@triton.jit
def _add(contexts, weights, tiles, rescale, PLAN: tl.constexpr):
    added = ()
    for t in tl.static_range(tile_count(PLAN)):
        context = contexts[t] * rescale[:, None]
        added += (tl.dot(weights.to(tiles[t].dtype), tiles[t], context, input_precision="ieee"),)  # type: ignore[assignment]
    return added


@triton.jit
def _load_tokens(
    latent, rope, key, key_in, latent_k, rope_k,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_SCALED: tl.constexpr, ROPE_SCALED: tl.constexpr,
):  # fmt: skip
    """Words and scales of some tokens; a scale is one where there is none."""
    latent_scale = tl.full(key.shape, 1.0, tl.float32)
    rope_scale = latent_scale
    if LATENT_SCALED:
        latent_scale = load_scales(latent, key, key_in, latent_k)
    if ROPE_SCALED:
        rope_scale = load_scales(rope, key, key_in, rope_k)
    words = load_words(latent, key, key_in, latent_k, LATENT)
    return words, load_words(rope, key, key_in, rope_k, ROPE), latent_scale, rope_scale


@triton.jit(do_not_specialize=["keys", "blocks", "first_query", "window"])
def coded_partial_kernel(
    query, latent, rope, exact, exact_rope, places, mask, ranges, partial, partial_lse,
    rows, queries, keys, blocks, first_query, window, scale, softcap,
    latent_b, latent_k, rope_b, rope_k, exact_b, exact_k, exact_rope_b, exact_rope_k, mask_b, mask_h, mask_q, mask_k,
    RANK: tl.constexpr, WIDTH: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    LATENT_SCALED: tl.constexpr, ROPE_SCALED: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK: tl.constexpr, ADDITIVE: tl.constexpr,
    RANGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `partial_kernel`, over codes: ``LATENT`` and ``ROPE`` are the plans of either part.

    ``exact [B, EXACT, r]`` and ``exact_rope [B, EXACT, d_r]`` stand in the place of as many tokens of a sequence, from
    ``places [B]`` on. A token's scale multiplies its score and its weight.
    """
    DTYPE: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_in = row < rows
    position = first_query + row % queries
    start, end = share_of_keys(
        ranges, batch, blocks, queries, keys, first_query, window, BLOCK_KEYS, RANGES, CAUSAL, WINDOW
    )
    query += (batch * rows + row)[:, None] * WIDTH
    q, q_rope = _load_rows(query, row_in, LATENT, DTYPE), _load_rows(query + RANK, row_in, ROPE, DTYPE)
    if MASK:
        mask += batch * mask_b + (row // queries) * mask_h + (row % queries) * mask_q

    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    contexts = ()
    for t in tl.static_range(tile_count(LATENT)):
        contexts += (tl.zeros((BLOCK_ROWS, tile(LATENT, t, "block")), tl.float32),)  # type: ignore[assignment]

    place = tl.load(places + batch).to(tl.int32)
    if EXACT:
        exact += batch * exact_b
        exact_rope += batch * exact_rope_b
        # The first split takes them all.
        for first in range(0, EXACT if tl.program_id(1) == 0 else 0, _EXACT_KEYS):
            own = first + tl.arange(0, _EXACT_KEYS)
            key = place + own
            key_in = (own < EXACT) & (key >= 0) & (key < keys)
            tiles = _load_rows(exact + own[:, None] * exact_k, key_in, LATENT, DTYPE)
            rotary = _load_rows(exact_rope + own[:, None] * exact_rope_k, key_in, ROPE, DTYPE)
            scores = _products(q, tiles, tl.zeros((BLOCK_ROWS, _EXACT_KEYS), tl.float32), LATENT)
            scores = _products(q_rope, rotary, scores, ROPE)
            scores = visible_scores(
                scores * scale, mask, mask_k, key, key_in, row_in, position, window, softcap,
                MASK, ADDITIVE, CAUSAL, WINDOW, SOFTCAP,
            )  # fmt: skip
            weights, rescale, maximum, total = softmax_step(scores, maximum, total)
            contexts = _add(contexts, weights, tiles, rescale, LATENT)

    latent += batch * latent_b
    rope += batch * rope_b
    key = start + tl.arange(0, BLOCK_KEYS)
    ahead = _load_tokens(
        latent, rope, key, key < end, latent_k, rope_k, LATENT, ROPE, LATENT_SCALED, ROPE_SCALED
    )  # fmt: skip
    for first in range(start, end, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        words, rope_words, latent_scale, rope_scale = ahead
        # The next tokens are on their way while these are worked on.
        behind = key + BLOCK_KEYS
        ahead = _load_tokens(
            latent, rope, behind, behind < end, latent_k, rope_k, LATENT, ROPE, LATENT_SCALED, ROPE_SCALED
        )  # fmt: skip
        key_in = key < end
        tiles, rotary = _unpack(words, LATENT, DTYPE, HALF), _unpack(rope_words, ROPE, DTYPE, HALF)
        none = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
        scores = _products(q, tiles, none, LATENT) * latent_scale[None, :]
        scores += _products(q_rope, rotary, none, ROPE) * rope_scale[None, :]
        coded = key_in & ((key < place) | (key >= place + EXACT))
        scores = visible_scores(
            scores * scale, mask, mask_k, key, coded, row_in, position, window, softcap,
            MASK, ADDITIVE, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
        weights, rescale, maximum, total = softmax_step(scores, maximum, total)
        contexts = _add(contexts, weights * latent_scale[None, :], tiles, rescale, LATENT)

    divisor, lse = divisor_and_lse(maximum, total)
    out = (batch * tl.num_programs(1) + tl.program_id(1)) * rows + row
    for t in tl.static_range(tile_count(LATENT)):
        channel, channel_in = channels_of(LATENT, t)
        pointer = partial + out[:, None] * RANK + channel[None, :]
        tl.store(pointer, contexts[t] / divisor[:, None], mask=row_in[:, None] & channel_in[None, :])
    tl.store(partial_lse + out, lse, mask=row_in)
