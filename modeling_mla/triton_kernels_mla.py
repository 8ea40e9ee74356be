"""The Triton kernels of absorbed decode over plain latents, and what those over codes have in common with them.

Imported only where they are used: by `triton_decode_mla`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton backend needs the package triton; install it with `pip install triton`.") from error

INTERPRETED = triton.knobs.runtime.interpret
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible_range_kernel(
    mask, ranges, keys, stride_b, stride_q, stride_k, queries, BLOCK: tl.constexpr
):  # fmt: skip
    """First visible key and the one behind the last, in a block of keys, over all queries of a sequence."""
    batch, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = block * BLOCK + tl.arange(0, BLOCK)
    pointer = mask + batch * stride_b + key * stride_k
    seen = tl.zeros((BLOCK,), tl.int32)
    for query in range(queries):
        seen |= tl.load(pointer + query * stride_q, mask=key < keys, other=0).to(tl.int32)
    out = ranges + 2 * (batch * tl.num_programs(1) + block)
    tl.store(out, tl.min(tl.where(seen != 0, key, keys)))
    tl.store(out + 1, tl.max(tl.where(seen != 0, key + 1, 0)))


@triton.jit
def share_of_keys(
    ranges, batch, blocks, queries, keys, first_query, window,
    BLOCK_KEYS: tl.constexpr, RANGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Where the keys of this program's split begin and end, among those that any query may see."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    start, end = 0, keys
    if RANGES:
        block = tl.arange(0, RANGES)
        pair = ranges + 2 * (batch * blocks + block)
        start = tl.min(tl.load(pair, mask=block < blocks, other=keys))
        end = tl.max(tl.load(pair + 1, mask=block < blocks, other=0))
    if CAUSAL:
        end = tl.minimum(end, first_query + queries)
    if WINDOW:
        start = tl.maximum(start, first_query - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), splits), BLOCK_KEYS) * BLOCK_KEYS
    start += split * share
    return start, tl.minimum(start + share, end)


@triton.jit
def visible_scores(
    scores, mask, mask_k, key, key_in, row_in, position, window, softcap,
    MASK: tl.constexpr, ADDITIVE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores ``[rows, keys]`` under their cap, ``-inf`` where a row does not see a key; ``mask`` points to its rows."""
    if SOFTCAP:
        # tanh by the exponential of a negative number, which cannot overflow.
        turned = tl.exp2(tl.minimum(scores, -scores) * (2 * _LOG2E / softcap))
        scores = tl.where(scores < 0, -softcap, softcap) * (1 - turned) / (1 + turned)
    visible = row_in[:, None] & key_in[None, :]
    if CAUSAL:
        visible &= key[None, :] <= position[:, None]
    if WINDOW:
        visible &= key[None, :] > position[:, None] - window
    if MASK:
        given = tl.load(mask[:, None] + key.to(tl.int64)[None, :] * mask_k, mask=visible, other=0)
        if ADDITIVE:
            scores += given.to(tl.float32)
        else:
            visible &= given != 0
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_step(scores, maximum, total):
    """Weights of some more keys, what all before them is to be multiplied with, and the new maximum and total."""
    largest = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum.
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((scores - finite[:, None]) * _LOG2E)
    rescale = tl.exp2((maximum - finite) * _LOG2E)
    return weights, rescale, largest, total * rescale + tl.sum(weights, 1)


@triton.jit
def divisor_and_lse(maximum, total):
    """What a row's context is to be divided by, and its log-sum-exp."""
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    return divisor, tl.where(seen, maximum + tl.log2(divisor) / _LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["keys", "blocks", "first_query", "window"])
def partial_kernel(
    query, latents, mask, ranges, partial, partial_lse,
    rows, queries, keys, blocks, first_query, window, scale, softcap,
    latents_b, latents_k, mask_b, mask_h, mask_q, mask_k,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK: tl.constexpr, ADDITIVE: tl.constexpr,
    RANGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention from some query rows to one split of the keys: normalised output and log-sum-exp, in float32."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel, rotary = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    row_in, channel_in, rotary_in = row < rows, channel < RANK, rotary < ROPE
    position = first_query + row % queries
    start, end = share_of_keys(
        ranges, batch, blocks, queries, keys, first_query, window, BLOCK_KEYS, RANGES, CAUSAL, WINDOW
    )

    query += (batch * rows + row)[:, None] * (RANK + ROPE)
    q = tl.load(query + channel[None, :], mask=row_in[:, None] & channel_in[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    if ROPE:
        q_rope = tl.load(query + RANK + rotary[None, :], mask=row_in[:, None] & rotary_in[None, :], other=0.0)
        if UPCAST:
            q_rope = q_rope.to(tl.float32)
    latents += batch * latents_b
    if MASK:
        mask += batch * mask_b + (row // queries) * mask_h + (row % queries) * mask_q

    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    context = tl.zeros((BLOCK_ROWS, BLOCK_R), tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        key_in = key < end
        token = latents + key.to(tl.int64)[:, None] * latents_k
        # One tile is key and value.
        c = tl.load(token + channel[None, :], mask=key_in[:, None] & channel_in[None, :], other=0.0)
        if UPCAST:
            c = c.to(tl.float32)
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        if ROPE:
            k = tl.load(token + RANK + rotary[None, :], mask=key_in[:, None] & rotary_in[None, :], other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
            scores = tl.dot(q_rope, tl.trans(k), scores, input_precision="ieee")
        scores = visible_scores(
            scores * scale, mask, mask_k, key, key_in, row_in, position, window, softcap,
            MASK, ADDITIVE, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
        weights, rescale, maximum, total = softmax_step(scores, maximum, total)
        context = tl.dot(weights.to(c.dtype), c, context * rescale[:, None], input_precision="ieee")

    divisor, lse = divisor_and_lse(maximum, total)
    out = (batch * tl.num_programs(1) + tl.program_id(1)) * rows + row
    place = partial + out[:, None] * RANK + channel[None, :]
    tl.store(place, context / divisor[:, None], mask=row_in[:, None] & channel_in[None, :])
    tl.store(partial_lse + out, lse, mask=row_in)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial, partial_lse, context, lse, rows, splits,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The softmax over all splits of one query row, for a block of channels."""
    batch, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    maximum, total = float("-inf"), 0.0
    merged = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        at = (batch * splits + split) * rows + row
        part = tl.load(
            partial + at[:, None] * RANK + channel[None, :],
            mask=(split < splits)[:, None] & (channel < RANK)[None, :],
            other=0.0,
        )
        part_lse = tl.load(partial_lse + at, mask=split < splits, other=float("-inf"))
        largest = tl.maximum(maximum, tl.max(part_lse, 0))
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2((part_lse - finite) * _LOG2E)
        rescale = tl.exp2((maximum - finite) * _LOG2E)
        total = total * rescale + tl.sum(weights, 0)
        merged = merged * rescale + tl.sum(weights[:, None] * part, 0)
        maximum = largest
    some = tl.where(total > 0, total, 1.0)
    at = batch * tl.num_programs(1) + row
    tl.store(context + at * RANK + channel, merged / some, mask=channel < RANK)
    if tl.program_id(2) == 0:
        tl.store(lse + at, tl.where(total > 0, maximum + tl.log2(some) / _LOG2E, float("-inf")))
