"""Levels of a few bits, packed into bytes.

A level is split into fields whose widths divide a byte, its *planes*. A plane of m bytes holds the field of channel c
in byte ``c % m``, at place ``c // m`` from the lowest bits: fields of one place are neighbouring channels, so that
unpacking is one shift and one mask over whole ranges of channels.
"""

from __future__ import annotations

import torch

from .latent_code_mla import plane_bytes, planes


def pack_levels(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """``levels [..., n]``, int8 from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``, to ``[..., bytes]`` int8."""
    packed, below = [], bits
    for width in planes(bits):
        below -= width
        packed.append(_pack_plane(levels >> below, width))
    return torch.cat(packed, dim=-1)


def unpack_levels(packed: torch.Tensor, channels: int, bits: int) -> torch.Tensor:
    """The inverse of `pack_levels`: ``[..., bytes]`` int8, of any strides, to ``[..., channels]`` int8."""
    levels: torch.Tensor | None = None
    start = 0
    for width in planes(bits):
        stop = start + plane_bytes(channels, width)
        fields = _unpack_plane(packed[..., start:stop], channels, width, signed=levels is None)
        levels = fields if levels is None else levels.bitwise_left_shift_(width).bitwise_or_(fields)
        start = stop
    assert levels is not None
    return levels


def _pack_plane(fields: torch.Tensor, width: int) -> torch.Tensor:
    if width == 8:
        return fields
    size, places = plane_bytes(fields.shape[-1], width), 8 // width
    fields = torch.nn.functional.pad(fields & ((1 << width) - 1), (0, places * size - fields.shape[-1]))
    packed = fields[..., :size]
    for place in range(1, places):
        packed = packed | (fields[..., place * size : (place + 1) * size] << (place * width))
    return packed


def _unpack_plane(packed: torch.Tensor, channels: int, width: int, signed: bool) -> torch.Tensor:
    if width == 8:
        return packed
    places = 8 // width
    fields = []
    for place in range(places):
        if signed:
            # Up to the sign, then down again with it.
            above = 8 - (place + 1) * width
            fields.append((packed << above if above else packed) >> (8 - width))
        else:
            fields.append((packed >> (place * width) if place else packed) & ((1 << width) - 1))
    return torch.cat(fields, dim=-1)[..., :channels]
