"""How a kernel takes coded rows apart: the words that it loads, and which levels it finds at one place of all of them.

Levels at one place of the words of a run are a tile: neighbouring columns are channels a fixed step apart. Queries and
contexts are cut into the same tiles, so no level ever moves to another channel's place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .bit_packing_mla import Piece, packed_bytes, ranges_of_levels
from .latent_code_mla import EXACT, PartCode, largest, middle

_LEAST_COLUMNS = 16
"""Matrix units take no fewer channels."""
_WANTED_COLUMNS = 32
"""Words are as long as leaves so many of them to a tile."""


class Words(NamedTuple):
    """What is loaded of a segment: ``runs`` times ``words`` of ``size`` bytes, from a byte behind the scales on.

    ``block`` is ``words`` padded to a power of two.
    """

    start: int
    size: int
    words: int
    runs: int
    block: int


class LevelTile(NamedTuple):
    """Levels at one place of all words of the segment with this index.

    A level less the ``middle`` is at most ``limit``; 16 ``bits`` are a number themselves. ``pieces`` are those of a
    level by their place in the words of their runs. Column ``i`` is channel ``first + i * step`` of the part, for the
    first ``columns`` of ``block``.
    """

    segment: int
    bits: int
    middle: float
    limit: float
    pieces: tuple[Piece, ...]
    first: int
    step: int
    columns: int
    block: int


class CodePlan(NamedTuple):
    """How a part is read that has one scale a token, or none."""

    words: tuple[Words, ...]
    tiles: tuple[LevelTile, ...]
    scale_shares: tuple[float, ...]

    @property
    def columns(self) -> int:
        """Of all tiles, padded ones included."""
        return sum(tile.block for tile in self.tiles)


@functools.cache
def code_plan(code: PartCode, alignment: int) -> CodePlan:
    """The plan for rows whose levels begin at multiples of ``alignment`` bytes, a power of two up to 16."""
    words: list[Words] = []
    tiles: list[LevelTile] = []
    first, start = 0, 0
    for channels, bits in code.segments:
        if bits == EXACT:
            run, ranges, size, a_word = _whole_numbers(channels)
        else:
            run, ranges = ranges_of_levels(channels, bits)
            size = a_word = _word_size(start, run, alignment)
        own = Words(start, size, run // a_word, 1 + max(p.run for pieces in ranges for p in pieces), 0)
        own = own._replace(block=max(1 << (own.words - 1).bit_length(), _LEAST_COLUMNS))
        for index, pieces in enumerate(ranges):
            for place in range(a_word):
                columns = -(-(min(run, channels - index * run) - place) // a_word)
                if columns > 0:
                    moved = tuple(piece._replace(in_byte=piece.in_byte + 8 * place) for piece in pieces)
                    tile = LevelTile(
                        len(words),
                        bits,
                        middle(bits),
                        largest(bits),
                        moved,
                        first + index * run + place,
                        a_word,
                        columns,
                        own.block,
                    )
                    tiles.append(tile)
        words.append(own)
        first, start = first + channels, start + (0 if bits == EXACT else packed_bytes(channels, bits))
    return CodePlan(tuple(words), tuple(tiles), code.scale_shares)


def _whole_numbers(channels: int) -> tuple[int, tuple[tuple[Piece, ...], ...], int, int]:
    """A run of channels whose words of 16 bits are numbers themselves: its length, pieces, bytes and levels a word."""
    return channels, ((Piece(0, 0, 0, EXACT),),), 2, 1


def _word_size(start: int, run: int, alignment: int) -> int:
    sizes = [size for size in (4, 2) if size <= alignment and start % size == run % size == 0]
    return next((size for size in sizes if run // size >= _WANTED_COLUMNS), 1)
