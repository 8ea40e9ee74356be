"""Levels of a few bits, packed into bytes.

A level is split into fields whose widths divide a byte, its *planes*. A plane of m bytes holds the field of channel c
in byte ``c % m``, at place ``c // m`` from the lowest bits: fields of one place are neighbouring channels, so that
unpacking is one shift and one mask over whole ranges of channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .latent_code_mla import plane_bytes, planes

_NARROW = 64
"""Bytes below which a plane is copied before its fields are taken out."""


def pack_levels(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """``levels [..., n]``, uint8 below ``2**bits``, to ``[..., bytes]`` uint8."""
    packed, below = [], bits
    for width in planes(bits):
        below -= width
        fields = levels.bitwise_right_shift(below).bitwise_and_((1 << width) - 1)
        size = plane_bytes(levels.shape[-1], width)
        plane = levels.new_zeros(*levels.shape[:-1], size)
        for place, channels in _places(levels.shape[-1], width):
            own = fields[..., channels]
            plane[..., : own.shape[-1]] |= own << (place * width)
        packed.append(plane)
    return torch.cat(packed, dim=-1)


def unpack_levels(packed: torch.Tensor, bits: int, levels: torch.Tensor) -> None:
    """The inverse of `pack_levels`, from ``[..., bytes]`` into ``levels [..., n]``, both uint8 and of any strides."""
    start, channels = 0, levels.shape[-1]
    for index, width in enumerate(planes(bits)):
        plane = packed[..., start : start + plane_bytes(channels, width)]
        start += plane.shape[-1]
        # Rows of a few bytes cost more than their bytes, and a place of few channels makes such rows.
        plane = plane.contiguous() if plane.shape[-1] < _NARROW else plane
        fields = levels if index == 0 else torch.empty_like(levels)
        for place, own in _places(channels, width):
            field = plane >> (place * width) if place else plane
            if (place + 1) * width < 8:
                field = field & ((1 << width) - 1)
            fields[..., own] = field[..., : own.stop - own.start]
        if index:
            levels.bitwise_left_shift_(width).bitwise_or_(fields)


def _places(channels: int, width: int) -> Iterator[tuple[int, slice]]:
    """The places of a plane's bytes, and the channels whose fields are there."""
    size = plane_bytes(channels, width)
    for place, first in enumerate(range(0, channels, size)):
        yield place, slice(first, min(first + size, channels))
