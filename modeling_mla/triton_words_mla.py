"""Codes in a Triton kernel: words are loaded, and taken apart in registers into tiles for matrix units.

Imported only by the kernels that use it. A ``PLAN`` is a `CodePlan`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def tile_count(PLAN):
    """Tiles of a part."""
    return len(PLAN.tiles)


@triton.constexpr_function
def tile(PLAN, t, name):
    """A number of tile ``t``."""
    return getattr(PLAN.tiles[t], name)


@triton.constexpr_function
def share_count(PLAN):
    """How many scales are tried."""
    return len(PLAN.scale_shares)


@triton.constexpr_function
def scale_share(PLAN, index):
    """One of them, as a share of the largest."""
    return PLAN.scale_shares[index]


@triton.constexpr_function
def word_count(PLAN):
    """Segments of a part."""
    return len(PLAN.words)


@triton.constexpr_function
def word(PLAN, s, name):
    """A number of the words of segment ``s``."""
    return getattr(PLAN.words[s], name)


@triton.constexpr_function
def piece_count(PLAN, t):
    """Pieces of a tile's levels."""
    return len(PLAN.tiles[t].pieces)


@triton.constexpr_function
def piece_run(PLAN, t, index):
    """The run in which a piece lies."""
    return PLAN.tiles[t].pieces[index].run


@triton.constexpr_function
def _piece_shift(PLAN, t, index, at):
    """Bits to shift a word right by, left where negative, for a level that is to begin at bit ``at``."""
    piece = PLAN.tiles[t].pieces[index]
    return piece.in_byte - piece.in_level - at


@triton.constexpr_function
def piece_mask(PLAN, t, index, at):
    """A piece's bits of a level that begins at bit ``at``."""
    piece = PLAN.tiles[t].pieces[index]
    return ((1 << piece.width) - 1) << (piece.in_level + at)


@triton.constexpr_function
def piece_in_level(PLAN, t, index):
    """A piece's first bit in its level."""
    return PLAN.tiles[t].pieces[index].in_level


@triton.constexpr_function
def piece_in_byte(PLAN, t, index):
    """A piece's first bit in its word."""
    return PLAN.tiles[t].pieces[index].in_byte


@triton.jit
def channels_of(PLAN: tl.constexpr, t: tl.constexpr):
    """``[block]``: the channel of the part that every column of a tile is, and whether there is one."""
    column = tl.arange(0, tile(PLAN, t, "block"))
    return tile(PLAN, t, "first") + column * tile(PLAN, t, "step"), column < tile(PLAN, t, "columns")


@triton.jit
def load_words(levels, key, key_in, stride, PLAN: tl.constexpr):
    """The words of some tokens: of every segment a tuple, for its runs, of ``[keys, block]``."""
    loaded = ()
    for s in tl.static_range(word_count(PLAN)):
        loaded += (_load_runs(levels, key, key_in, stride, PLAN, s),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _load_runs(levels, key, key_in, stride, PLAN: tl.constexpr, s: tl.constexpr):
    size: tl.constexpr = word(PLAN, s, "size")
    count: tl.constexpr = word(PLAN, s, "words")
    number: tl.constexpr = tl.int32 if size == 4 else tl.int16 if size == 2 else tl.uint8
    # A pointer is cast before it is spread, or the compiler does not see that words are neighbours.
    first = levels.to(tl.pointer_type(number), bitcast=True) + word(PLAN, s, "start") // size
    column = tl.arange(0, word(PLAN, s, "block"))
    inside = key_in[:, None] & (column < count)[None, :]
    token = key.to(tl.int64)[:, None] * (stride // size) + column[None, :]
    runs = ()
    for run in tl.static_range(word(PLAN, s, "runs")):
        runs += (tl.load(first + run * count + token, mask=inside, other=0),)  # type: ignore[assignment]
    return runs


@triton.jit
def load_scales(levels, key, key_in, stride):
    """``[keys]`` float32: the scales, a bfloat16 before a token's levels."""
    scale = levels.to(tl.pointer_type(tl.int16), bitcast=True) - 1
    bits = tl.load(scale + key.to(tl.int64) * (stride // 2), mask=key_in, other=0).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _levels(runs, PLAN: tl.constexpr, t: tl.constexpr, AT: tl.constexpr):
    """The levels of a tile, int32, which begin at bit ``AT``."""
    level = tl.zeros(runs[0].shape, tl.int32)
    for index in tl.static_range(piece_count(PLAN, t)):
        words = runs[piece_run(PLAN, t, index)].to(tl.int32)
        if _piece_shift(PLAN, t, index, AT) >= 0:
            words = words >> _piece_shift(PLAN, t, index, AT)
        else:
            words = words << -_piece_shift(PLAN, t, index, AT)
        level |= words & piece_mask(PLAN, t, index, AT)
    return level


@triton.jit
def unpacked(loaded, PLAN: tl.constexpr, t: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """``[keys, block]``: levels less their middle, as ``DTYPE``, to be multiplied by the tokens' scales."""
    bits: tl.constexpr = tile(PLAN, t, "bits")
    middle: tl.constexpr = tile(PLAN, t, "middle")
    runs = loaded[tile(PLAN, t, "segment")]
    if bits == 16:
        if HALF:
            numbers = runs[0].to(tl.float16, bitcast=True).to(DTYPE)
        else:
            numbers = (runs[0].to(tl.int32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    elif bits == 8:
        numbers = (runs[0].to(tl.int32) >> _piece_shift(PLAN, t, 0, 0)).to(tl.int8).to(DTYPE)
    # A level among the bits of a mantissa is a number without a conversion, and its middle is exact there as well.
    elif tl.bfloat16 == DTYPE:
        level = _levels(runs, PLAN, t, 7 - bits) | ((127 + bits) << 7)
        numbers = level.to(tl.int16).to(tl.bfloat16, bitcast=True) - (2**bits + middle)
    elif tl.float16 == DTYPE:
        level = _levels(runs, PLAN, t, 10 - bits) | ((15 + bits) << 10)
        numbers = level.to(tl.int16).to(tl.float16, bitcast=True) - (2**bits + middle)
    else:
        numbers = _levels(runs, PLAN, t, 0).to(DTYPE) - middle
    return numbers
