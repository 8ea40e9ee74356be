"""The Triton kernels of absorbed decode, and the operator that PyTorch sees of them.

Imported only where they are used: by `backend_triton_mla`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton backend needs the package triton; install it with `pip install triton`.") from error

_RANGE_BLOCK = 1024
_MERGED_SPLITS = 16
_MERGED_CHANNELS = 128
_WAVES = 2
"""Programs for every multiprocessor, where the context is long enough to give each its share."""
_LONGEST_GRID = 128
"""Splits of a sequence at most: merging them costs as much as reading as many tokens."""
_LOG2E = tl.constexpr(1.4426950408889634)
_MEASURED = (9, 0)
"""The compute capability on which tiles were tuned."""
_INTERPRETED = triton.knobs.runtime.interpret


class Tile(NamedTuple):
    """How one program works: query rows and keys that it holds at once, warps, stages of the pipeline of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(rows: int, dtype: torch.dtype, capability: tuple[int, int], additive: bool) -> Tile:
    """The tile for a sequence of ``rows`` queries of all heads.

    A program reads the latents once for all its rows, and every further program once more, mostly from the second-level
    cache. Shared memory sets the limit: 99 KB for compute capability 8.6, 8.9 and 12, 163 KB for 8.0, 227 KB for 9;
    an additive mask takes its part. The figures were tuned on an H100.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    small = capability[0] >= 12 or capability in ((8, 6), (8, 9))
    if rows <= 16 or small:
        return Tile(16, 32, 4, 3)
    return Tile(64, 64, 8, 2) if rows > 32 and capability[0] == 9 and not additive else Tile(32, 32, 4, 3)


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
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel, rotary = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    row_in, channel_in, rotary_in = row < rows, channel < RANK, rotary < ROPE
    position = first_query + row % queries

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
    end = tl.minimum(start + share, end)

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
        scores *= scale
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
        scores = tl.where(visible, scores, float("-inf"))
        largest = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum.
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2((scores - finite[:, None]) * _LOG2E)
        rescale = tl.exp2((maximum - finite) * _LOG2E)
        total = total * rescale + tl.sum(weights, 1)
        context = tl.dot(weights.to(c.dtype), c, context * rescale[:, None], input_precision="ieee")
        maximum = largest

    seen = total > 0
    context /= tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)) / _LOG2E, float("-inf"))
    out = (batch * splits + split) * rows + row
    tl.store(partial + out[:, None] * RANK + channel[None, :], context, mask=row_in[:, None] & channel_in[None, :])
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


def split_count(programs: int, keys: int, block_keys: int, multiprocessors: int) -> int:
    """Splits of every sequence, so that a device is full and none is shorter than two tiles.

    Args:
        programs: for one split of all sequences.

    Depends on shapes alone: under CUDA graphs a static cache keeps it.
    """
    wanted = _WAVES * multiprocessors // programs
    return max(min(wanted, keys // (2 * block_keys), _LONGEST_GRID), 1)


@functools.cache
def _device(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability."""
    if _INTERPRETED:
        # Any device gives the same result; a small one gives several splits and a remainder.
        return 4, _MEASURED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def _visible_ranges(mask: torch.Tensor, strides: Sequence[int], batch: int, keys: int) -> torch.Tensor:
    """``[B, blocks, 2]``: where the keys that any query sees begin and end, block by block."""
    blocks = triton.cdiv(keys, _RANGE_BLOCK)
    ranges = mask.new_empty(batch, blocks, 2, dtype=torch.int32)
    visible_range_kernel[(batch, blocks)](
        mask, ranges, keys, strides[0], strides[2], strides[3], mask.shape[2], BLOCK=_RANGE_BLOCK
    )  # fmt: skip
    return ranges


def decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    mask: torch.Tensor | None,
    first_query: int | None,
    window: int | None,
    kv_lora_rank: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed attention; returns context and log-sum-exp as `AbsorbedBackend.attend` does.

    Args:
        query: ``[B, H, n, r + d_r]``, float32, bfloat16 or float16.
        latents: ``[B, S, r + d_r]`` of the same type, dense channels.
        mask: ``[B or 1, H or 1, n or 1, S]``, bool (True attends) or additive.
        first_query: key at which the first query stands, where attention is causal beside the mask; else None.
        window: keys that a query sees, itself included.
    """
    batch, heads, queries, width = query.shape
    rows, keys = heads * queries, latents.shape[1]
    query = query.contiguous()
    multiprocessors, capability = _device(query.device)
    additive = mask is not None and mask.dtype != torch.bool
    tile = tile_for(rows, query.dtype, capability, additive)
    row_blocks = triton.cdiv(rows, tile.rows)
    splits = split_count(batch * row_blocks, keys, tile.keys, multiprocessors)
    partial = query.new_empty(batch, splits, rows, kv_lora_rank, dtype=torch.float32)
    partial_lse = query.new_empty(batch, splits, rows, dtype=torch.float32)
    context, lse = _outputs(query, kv_lora_rank)

    ranges = None
    strides: Sequence[int] = (0, 0, 0, 0)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        if mask is not None:
            mask = mask if additive else mask.view(torch.uint8)
            strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
            if not additive and mask.shape[1] == 1:
                ranges = _visible_ranges(mask, strides, batch, keys)
        blocks = 0 if ranges is None else ranges.shape[1]
        partial_kernel[(row_blocks, splits, batch)](
            query, latents, mask, ranges, partial, partial_lse,
            rows, queries, keys, blocks, first_query or 0, window or 0, scale, softcap or 0.0,
            *latents.stride()[:2], *strides,
            RANK=kv_lora_rank, ROPE=width - kv_lora_rank,
            BLOCK_R=_padded(kv_lora_rank), BLOCK_P=_padded(width - kv_lora_rank),
            BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys,
            MASK=mask is not None, ADDITIVE=additive, RANGES=triton.next_power_of_2(blocks) if blocks else 0,
            CAUSAL=first_query is not None, WINDOW=window is not None, SOFTCAP=softcap is not None,
            UPCAST=_INTERPRETED and query.dtype == torch.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        merge_kernel[(batch, rows, triton.cdiv(kv_lora_rank, _MERGED_CHANNELS))](
            partial, partial_lse, context, lse, rows, splits,
            RANK=kv_lora_rank, BLOCK_R=_MERGED_CHANNELS, BLOCK_SPLITS=_MERGED_SPLITS, num_warps=4,
        )  # fmt: skip
    return context, lse


def _padded(width: int) -> int:
    """Blocks are powers of two, and matrix units take 16 channels at least."""
    return max(triton.next_power_of_2(width), 16)


def _outputs(query: torch.Tensor, kv_lora_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    context = query.new_empty(*query.shape[:3], kv_lora_rank)
    return context, query.new_empty(*query.shape[:3], dtype=torch.float32)


# Every copy of this file, the package's and those of checkpoints, has an operator of its own.
absorbed_decode = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}::absorbed_decode",
    decode,
    mutates_args=(),
    schema="(Tensor query, Tensor latents, Tensor? mask, SymInt? first_query, SymInt? window, int kv_lora_rank, "
    "float scale, float? softcap) -> (Tensor, Tensor)",
)
"""`decode` as one operator of a compiled graph; calling it costs more than calling `decode`."""


@absorbed_decode.register_fake
def _(query, latents, mask, first_query, window, kv_lora_rank, scale, softcap):
    return _outputs(query, kv_lora_rank)
