"""Levels of a few bits, packed into bytes so that whole ranges of neighbouring channels unpack at once.

A byte holds ``8 // bits`` whole levels. Of 3, 5 and 6 bits it has some to spare, and the spare bits of a few bytes, put
together, are further levels: of 3 bits two levels a byte and two more in three bytes. The bytes of a row are so many
equal runs; levels at the same place of a byte, and further levels that come from the same runs, are ranges of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

_NARROW = 64
"""Bytes of a row below which they are copied before they are taken apart: short rows cost more than their bytes."""


class _Layout(NamedTuple):
    """How levels lie in the bytes of a row, which are ``runs`` of ``length`` bytes.

    A byte holds ``whole`` levels and ``spare`` bits; those of one byte from each run are ``further`` levels.
    """

    whole: int
    spare: int
    runs: int
    further: int
    length: int


class Piece(NamedTuple):
    """``width`` bits of a level, from ``in_level`` on, which lie in a run's bytes from ``in_byte`` on."""

    run: int
    in_level: int
    in_byte: int
    width: int


class _Piece(NamedTuple):
    """``width`` bits of a further level, from ``in_level`` on, which lie in a run's spare bits from ``in_spare`` on."""

    run: int
    in_level: int
    in_spare: int
    width: int


def _layout(channels: int, bits: int) -> _Layout:
    whole, spare = divmod(8, bits)
    together = math.lcm(spare, bits) if spare else 0
    runs, further = (together // spare, together // bits) if spare else (1, 0)
    return _Layout(whole, spare, runs, further, -(-channels // (runs * whole + further)))


def _pieces(layout: _Layout, bits: int, level: int) -> Iterator[_Piece]:
    """What a further level is made of, in the row of all spare bits."""
    for run in range(layout.runs):
        first, last = max(level * bits, run * layout.spare), min((level + 1) * bits, (run + 1) * layout.spare)
        if first < last:
            yield _Piece(run, first - level * bits, first - run * layout.spare, last - first)


def ranges_of_levels(channels: int, bits: int) -> tuple[int, tuple[tuple[Piece, ...], ...]]:
    """Where levels lie, for readers that take bytes apart themselves.

    Returns:
        Bytes of a run, which are also the channels of a range; and for every range, in the order of the channels, the
        pieces of its levels. A channel's place in its range is its byte's in the run; the last ranges may be cut off.
    """
    layout = _layout(channels, bits)
    whole = [(Piece(run, 0, place * bits, bits),) for place in range(layout.whole) for run in range(layout.runs)]
    further = [
        tuple(
            Piece(piece.run, piece.in_level, layout.whole * bits + piece.in_spare, piece.width)
            for piece in _pieces(layout, bits, level)
        )
        for level in range(layout.further)
    ]
    return layout.length, tuple(whole + further)


def packed_bytes(channels: int, bits: int) -> int:
    """Bytes that so many levels take."""
    layout = _layout(channels, bits)
    return layout.runs * layout.length


def unpack_levels(packed: torch.Tensor, bits: int, levels: torch.Tensor) -> None:
    """Takes bytes ``[..., packed_bytes(n, bits)]`` apart into ``levels [..., n]``, both uint8 and of any strides."""
    layout = _layout(levels.shape[-1], bits)
    size, length = layout.runs * layout.length, layout.length
    packed = packed.contiguous() if size < _NARROW else packed
    for place in range(layout.whole):
        _put(levels, place * size, _field(packed, place * bits, bits, 8))
    if levels.shape[-1] <= layout.whole * size:
        return
    spare = packed >> (layout.whole * bits)
    for level in range(layout.further):
        found: torch.Tensor | None = None
        for piece in _pieces(layout, bits, level):
            run = spare[..., piece.run * length : (piece.run + 1) * length]
            part = _field(run, piece.in_spare, piece.width, layout.spare)
            part = part << piece.in_level if piece.in_level else part
            found = part if found is None else found.bitwise_or_(part)
        assert found is not None
        _put(levels, layout.whole * size + level * length, found)


def _field(packed: torch.Tensor, first: int, width: int, end: int) -> torch.Tensor:
    """Bits ``first`` to ``first + width`` of bytes that are zero from bit ``end`` on; a copy, but for whole bytes."""
    field = packed >> first if first else packed
    return field if first + width == end else field & ((1 << width) - 1)


def _put(levels: torch.Tensor, first: int, field: torch.Tensor) -> None:
    target = levels[..., first : first + field.shape[-1]]
    target.copy_(field[..., : target.shape[-1]])
