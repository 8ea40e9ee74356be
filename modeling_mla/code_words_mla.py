"""How a kernel takes coded rows apart: words of a segment, which levels each holds, and where in a tile these come to lie.

Words are loaded as they lie, and levels that share one come to stand side by side in the tile: its columns are the
channels in another order, which queries and contexts follow.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .bit_packing_mla import Piece, packed_bytes, ranges_of_levels
from .latent_code_mla import EXACT, PartCode

_LEAST_COLUMNS = 16
"""Matrix units take no fewer channels."""


class Segment(NamedTuple):
    """Where the levels of a segment's channels lie in a token's bytes.

    Args:
        bits: of a level; 16 are a number themselves.
        channels: of the segment.
        first: channel, of the part.
        start: byte of the part's row.
        run: channels of a range, which are the bytes of a run of levels.
        ranges: the pieces of the levels in each range of channels.
        word: bytes that are loaded at once.
        block: words of a run, padded to a power of two.
    """

    bits: int
    channels: int
    first: int
    start: int
    run: int
    ranges: tuple[tuple[Piece, ...], ...]
    word: int
    block: int

    @property
    def levels(self) -> int:
        """Levels of one range in a word."""
        return 1 if self.bits == EXACT else self.word

    @property
    def together(self) -> int:
        """Levels that stand side by side, those of words at one place of their runs."""
        return self.levels * len(self.ranges)

    @property
    def columns(self) -> int:
        """Channels of the tile, padded ones included."""
        return self.block * self.together


@functools.cache
def segments_of(code: PartCode) -> tuple[Segment, ...]:
    """All segments of a part that has one scale or none."""
    found: list[Segment] = []
    first, start = 0, code.scale_bytes
    for channels, bits in code.segments:
        if bits == EXACT:
            run, ranges, word = channels, ((Piece(0, 0, 0, EXACT),),), 2
        else:
            run, ranges = ranges_of_levels(channels, bits)
            word = 1 if start % 2 or run % 2 else 2
        levels = 1 if bits == EXACT else word
        block = max(1 << (run // levels - 1).bit_length(), _LEAST_COLUMNS // (levels * len(ranges)), 2)
        found.append(Segment(bits, channels, first, start, run, ranges, word, block))
        first, start = first + channels, start + (0 if bits == EXACT else packed_bytes(channels, bits))
    return tuple(found)
