"""Segments of codes in a Triton kernel: their words are loaded, and taken apart in registers into tiles for matrix units.

Imported only where it is used: by `triton_coded_kernels_mla`. What the columns of a tile are is said in
`code_words_mla`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .latent_code_mla import middle


@triton.constexpr_function
def count(SEGMENTS):
    """Segments there are."""
    return len(SEGMENTS)


@triton.constexpr_function
def field(SEGMENTS, s, name):
    """A number of segment ``s``."""
    return getattr(SEGMENTS[s], name)


@triton.constexpr_function
def _runs(SEGMENTS, s):
    return 1 + max(piece.run for pieces in SEGMENTS[s].ranges for piece in pieces)


@triton.constexpr_function
def _pieces(SEGMENTS, s, t):
    return len(SEGMENTS[s].ranges[t // SEGMENTS[s].levels])


@triton.constexpr_function
def _piece(SEGMENTS, s, t, index):
    """Run, bits to shift right by (left where negative) and mask, for a level that is to begin at its bit."""
    segment = SEGMENTS[s]
    piece = segment.ranges[t // segment.levels][index]
    shift = 8 * (t % segment.levels) + piece.in_byte - piece.in_level
    return piece.run, shift, ((1 << piece.width) - 1) << piece.in_level


@triton.constexpr_function
def _piece_run(SEGMENTS, s, t, index):
    return _piece(SEGMENTS, s, t, index)[0]


@triton.constexpr_function
def _piece_shift(SEGMENTS, s, t, index, at):
    return _piece(SEGMENTS, s, t, index)[1] - at


@triton.constexpr_function
def _piece_mask(SEGMENTS, s, t, index, at):
    return _piece(SEGMENTS, s, t, index)[2] << at


@triton.constexpr_function
def _middle(bits):
    return middle(bits)


@triton.jit
def channels_of(SEGMENTS: tl.constexpr, s: tl.constexpr):
    """``[columns]``: the channel of the part that every column of a tile is, and whether there is one."""
    column = tl.arange(0, field(SEGMENTS, s, "columns"))
    t = column % field(SEGMENTS, s, "together")
    place = column // field(SEGMENTS, s, "together") * field(SEGMENTS, s, "levels") + t % field(SEGMENTS, s, "levels")
    own = t // field(SEGMENTS, s, "levels") * field(SEGMENTS, s, "run") + place
    inside = (place < field(SEGMENTS, s, "run")) & (own < field(SEGMENTS, s, "channels"))
    return field(SEGMENTS, s, "first") + own, inside


@triton.jit
def load_words(rows, key, key_in, stride, SEGMENTS: tl.constexpr):
    """The words of some tokens: of every segment a tuple, for its runs, of ``[keys, block]``."""
    loaded = ()
    token = rows + key.to(tl.int64)[:, None] * stride
    for s in tl.static_range(count(SEGMENTS)):
        word = tl.arange(0, field(SEGMENTS, s, "block"))
        inside = key_in[:, None] & (word < field(SEGMENTS, s, "run") // field(SEGMENTS, s, "levels"))[None, :]
        runs = ()
        for run in tl.static_range(_runs(SEGMENTS, s)):
            place = token + (field(SEGMENTS, s, "start") + run * field(SEGMENTS, s, "run"))
            place += word[None, :] * field(SEGMENTS, s, "word")
            if field(SEGMENTS, s, "word") == 2:
                place = place.to(tl.pointer_type(tl.int16), bitcast=True)
            runs += (tl.load(place, mask=inside, other=0),)
        loaded += (runs,)
    return loaded


@triton.jit
def load_scales(rows, key, key_in, stride):
    """``[keys]`` float32: the scales, bfloat16, with which the tokens' rows begin."""
    place = (rows + key.to(tl.int64) * stride).to(tl.pointer_type(tl.int16), bitcast=True)
    bits = tl.load(place, mask=key_in, other=0).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _levels(runs, SEGMENTS: tl.constexpr, s: tl.constexpr, t: tl.constexpr, AT: tl.constexpr):
    """Levels ``t`` of all words, int32, which begin at bit ``AT``."""
    level = tl.zeros(runs[0].shape, tl.int32)
    for index in tl.static_range(_pieces(SEGMENTS, s, t)):
        words = runs[_piece_run(SEGMENTS, s, t, index)].to(tl.int32)
        if _piece_shift(SEGMENTS, s, t, index, AT) >= 0:
            words = words >> _piece_shift(SEGMENTS, s, t, index, AT)
        else:
            words = words << -_piece_shift(SEGMENTS, s, t, index, AT)
        level |= words & _piece_mask(SEGMENTS, s, t, index, AT)
    return level


@triton.jit
def _numbers(runs, SEGMENTS: tl.constexpr, s: tl.constexpr, t: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """Levels ``t`` of all words less their middle, as ``DTYPE``."""
    bits: tl.constexpr = field(SEGMENTS, s, "bits")
    if bits == 16:
        if HALF:
            return runs[0].to(tl.float16, bitcast=True).to(DTYPE)
        return (runs[0].to(tl.int32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    if bits == 8:
        return (runs[0].to(tl.int32) >> (8 * t)).to(tl.int8).to(DTYPE)
    # A level among the bits of a mantissa is a number without a conversion, and its middle is exact there as well.
    if DTYPE == tl.bfloat16:
        level = _levels(runs, SEGMENTS, s, t, 7 - bits) | ((127 + bits) << 7)
        return level.to(tl.int16).to(tl.bfloat16, bitcast=True) - (2**bits + _middle(bits))
    if DTYPE == tl.float16:
        level = _levels(runs, SEGMENTS, s, t, 10 - bits) | ((15 + bits) << 10)
        return level.to(tl.int16).to(tl.float16, bitcast=True) - (2**bits + _middle(bits))
    return _levels(runs, SEGMENTS, s, t, 0).to(DTYPE) - _middle(bits)


@triton.jit
def _joined(tiles, COUNT: tl.constexpr):
    """Half as many tiles, each of two side by side."""
    pairs = ()
    for index in tl.static_range(COUNT):
        pairs += (tl.join(tiles[index], tiles[index + COUNT]),)
    return pairs


@triton.jit
def unpacked(runs, SEGMENTS: tl.constexpr, s: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """``[keys, columns]`` of a segment's words; to be multiplied by the tokens' scales."""
    tiles = ()
    for t in tl.static_range(field(SEGMENTS, s, "together")):
        tiles += (_numbers(runs, SEGMENTS, s, t, DTYPE, HALF),)
    if field(SEGMENTS, s, "together") >= 16:
        tiles = _joined(tiles, 8)
    if field(SEGMENTS, s, "together") >= 8:
        tiles = _joined(tiles, 4)
    if field(SEGMENTS, s, "together") >= 4:
        tiles = _joined(tiles, 2)
    if field(SEGMENTS, s, "together") >= 2:
        tiles = _joined(tiles, 1)
    return tl.reshape(tiles[0], (runs[0].shape[0], field(SEGMENTS, s, "columns")))
