"""Absorbed decode by the Triton kernels: how their work is split, and the operator that PyTorch sees of them.

It needs the package triton, so `backend_triton_mla` imports it only where it is used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .triton_kernels_mla import INTERPRETED, merge_kernel, partial_kernel, visible_range_kernel

_RANGE_BLOCK = 1024
_MERGED_SPLITS = 16
_MERGED_CHANNELS = 128
_WAVES = 2
"""Programs for every multiprocessor, where the context is long enough to give each its share."""
_LONGEST_GRID = 128
"""Splits of a sequence at most: merging them costs as much as reading as many tokens."""
_MEASURED = (9, 0)
"""The compute capability on which tiles were tuned: the H100's."""


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


def split_count(programs: int, keys: int, block_keys: int, multiprocessors: int) -> int:
    """Splits of every sequence's keys, so that a device is full and none is shorter than two tiles.

    ``programs`` are those for one split of all sequences. The number depends on shapes alone: under CUDA graphs a
    static cache keeps it.
    """
    wanted = _WAVES * multiprocessors // programs
    return max(min(wanted, keys // (2 * block_keys), _LONGEST_GRID), 1)


@functools.cache
def device_properties(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability."""
    if INTERPRETED:
        # Any device gives the same result; this one gives every number of splits.
        return 32, _MEASURED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def _visible_ranges(mask: torch.Tensor, strides: Sequence[int], batch: int, keys: int) -> torch.Tensor:
    """``[B, blocks, 2]``: where the keys that any query sees begin and end, block by block."""
    blocks = -(-keys // _RANGE_BLOCK)
    ranges = mask.new_empty(batch, blocks, 2, dtype=torch.int32)
    visible_range_kernel[(batch, blocks)](
        mask, ranges, keys, strides[0], strides[2], strides[3], mask.shape[2], BLOCK=_RANGE_BLOCK
    )  # fmt: skip
    return ranges


class Keys(NamedTuple):
    """What hides keys, as `VisibleKeys` gives it.

    ``mask [B or 1, H or 1, n or 1, S]`` is bool (True attends) or additive; ``first_query`` is the key at which the
    first query stands where attention is causal beside it; ``window`` counts the keys that a query sees.
    """

    mask: torch.Tensor | None
    first_query: int | None
    window: int | None


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
        mask: as of `Keys`, like the next two.
        first_query: see there.
        window: see there.
        kv_lora_rank: r, how many of the channels are the value as well.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.
    """
    query = query.contiguous()
    rope = query.shape[-1] - kv_lora_rank
    constants = {
        "RANK": kv_lora_rank, "ROPE": rope, "BLOCK_R": _padded(kv_lora_rank), "BLOCK_P": _padded(rope)
    }  # fmt: skip

    def launch(grid: tuple[int, ...], work: Work, **shared) -> None:
        partial_kernel[grid](
            query, latents, *work.tensors, *work.numbers, *latents.stride()[:2], *work.strides, **constants, **shared
        )

    hidden = Keys(mask, first_query, window)
    tile = tile_for(query.shape[1] * query.shape[2], query.dtype, device_properties(query.device)[1], is_additive(mask))
    return attend_in_splits(query, latents.shape[1], hidden, kv_lora_rank, scale, softcap, tile, launch)


class Work(NamedTuple):
    """What every kernel that reads a cache is given: mask, its ranges, where to write; sizes; strides of the mask."""

    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, ...]
    strides: Sequence[int]


def attend_in_splits(
    query: torch.Tensor,
    keys: int,
    hidden: Keys,
    kv_lora_rank: int,
    scale: float,
    softcap: float | None,
    tile: Tile,
    launch: Callable[..., None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to splits of the keys by the kernel that ``launch`` starts, and the merge of the splits.

    Args:
        query: ``[B, H, n, r + d_r]``.
        keys: how many there are.
        hidden: which of them a query does not see.
        kv_lora_rank: r.
        scale: of the scores.
        softcap: on the scores, or None.
        tile: rows and keys of a block.
        launch: the kernel.

    Returns:
        The context ``[B, H, n, r]`` in the query's dtype, and the log-sum-exp ``[B, H, n]``, float32.
    """
    batch, heads, queries, _ = query.shape
    rows, mask, additive = heads * queries, hidden.mask, is_additive(hidden.mask)
    row_blocks = -(-rows // tile.rows)
    splits = split_count(batch * row_blocks, keys, tile.keys, device_properties(query.device)[0])
    partial = query.new_empty(batch, splits, rows, kv_lora_rank, dtype=torch.float32)
    partial_lse = query.new_empty(batch, splits, rows, dtype=torch.float32)
    context, lse = outputs(query, kv_lora_rank)

    ranges = None
    strides: Sequence[int] = (0, 0, 0, 0)
    with on_device_of(query):
        if mask is not None:
            mask = mask if additive else mask.view(torch.uint8)
            strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
            if not additive and mask.shape[1] == 1:
                ranges = _visible_ranges(mask, strides, batch, keys)
        blocks = 0 if ranges is None else ranges.shape[1]
        numbers = (rows, queries, keys, blocks, hidden.first_query or 0, hidden.window or 0, scale, softcap or 0.0)
        launch(
            (row_blocks, splits, batch), Work((mask, ranges, partial, partial_lse), numbers, strides),
            BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys,
            MASK=mask is not None, ADDITIVE=additive, RANGES=_power_of_two(blocks) if blocks else 0,
            CAUSAL=hidden.first_query is not None, WINDOW=hidden.window is not None, SOFTCAP=softcap is not None,
            UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        merge_kernel[(batch, rows, -(-kv_lora_rank // _MERGED_CHANNELS))](
            partial, partial_lse, context, lse, rows, splits,
            RANK=kv_lora_rank, BLOCK_R=_MERGED_CHANNELS, BLOCK_SPLITS=_MERGED_SPLITS, num_warps=4,
        )  # fmt: skip
    return context, lse


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Where kernels for a tensor of any shape are launched; entering a device costs time, so only another one is."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_additive(mask: torch.Tensor | None) -> bool:
    """Whether a mask, of any shape, is added to the scores, not a choice among them."""
    return mask is not None and mask.dtype != torch.bool


def _padded(width: int) -> int:
    """The block for ``width`` channels: blocks are powers of two, and matrix units take 16 channels at least."""
    return max(_power_of_two(width), 16)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def outputs(query: torch.Tensor, kv_lora_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the context ``[B, H, n, r]`` and the log-sum-exp ``[B, H, n]``."""
    context = query.new_empty(*query.shape[:3], kv_lora_rank)
    return context, query.new_empty(*query.shape[:3], dtype=torch.float32)


# Every copy of this file, the package's and those of checkpoints, has an operator of its own.
NAMESPACE = re.sub(r"[^0-9a-zA-Z]", "_", __name__)
absorbed_decode = torch.library.custom_op(
    f"{NAMESPACE}::absorbed_decode",
    decode,
    mutates_args=(),
    schema="(Tensor query, Tensor latents, Tensor? mask, SymInt? first_query, SymInt? window, int kv_lora_rank, "
    "float scale, float? softcap) -> (Tensor, Tensor)",
)
"""`decode` as one operator of a compiled graph; calling it costs more than calling `decode`."""


@absorbed_decode.register_fake
def _(query, latents, mask, first_query, window, kv_lora_rank, scale, softcap):
    return outputs(query, kv_lora_rank)
