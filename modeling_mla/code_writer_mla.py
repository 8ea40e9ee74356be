"""Writing codes in PyTorch: scales, levels and bytes of new tokens, of all parts of a row at once.

Of one token every operator costs more than its work, so candidates of a scale are tried side by side, and what a byte
is made of is looked up in a table, whatever bits its channels have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .bit_packing_mla import packed_bytes, ranges_of_levels
from .latent_code_mla import PartCode, largest, middle

_VALUES, _CPU_VALUES = 1 << 26, 1 << 17
"""Candidates of levels that are held at once, in float32: more would leave a processor's caches."""


class RowWriter:
    """Writes the coded parts of a row, which lie side by side and of which none is kept in 16 bits.

    Attributes:
        middles: ``[n]`` float32, what is taken from every channel's level.
        limits: ``[n]`` float32, the largest absolute value of what is left.
    """

    def __init__(self, parts: Sequence[PartCode], device: torch.device) -> None:
        by_channel = [bits for part in parts for channels, bits in part.segments for _ in range(channels)]
        self.middles, self.limits = (
            torch.tensor([of(bits) for bits in by_channel], dtype=torch.float32, device=device)
            for of in (middle, largest)
        )
        self.least, self.most = self.middles - self.limits, self.middles + self.limits
        self.groups = [channels for part in parts for channels in part.groups]
        owners = [group for group, channels in enumerate(self.groups) for _ in range(channels)]
        self.owners = torch.tensor(owners, device=device)
        shares = [part.scale_shares for part in parts for _ in part.groups]
        tried = max(len(own) for own in shares)
        # A part for which fewer are tried has its first ones again, and of equals the first is taken.
        padded = [own + own[:1] * (tried - len(own)) for own in shares]
        self.shares = torch.tensor(padded, dtype=torch.float32, device=device).t().unsqueeze(1)
        self.packing = _Packing.of(parts, device)

    def write(self, rotated: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to bytes ``[..., sum of nbytes]`` uint8: of every part the scales, then the levels."""
        states = rotated.reshape(-1, rotated.shape[-1]).float()
        values = _CPU_VALUES if states.device.type == "cpu" else _VALUES
        pieces = states.split(max(values // (len(self.shares) * states.shape[1]), 1))
        rows = [self._write(piece) for piece in pieces]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(*rotated.shape[:-1], -1)

    def _write(self, states: torch.Tensor) -> torch.Tensor:
        tops = [share.amax(-1, keepdim=True) for share in (states.abs() / self.limits).split(self.groups, -1)]
        scales = _rounded_up(torch.cat(tops, -1) * self.shares)
        # Where a scale is zero all its states are.
        steps = self._by_channel(scales.float().clamp_(min=torch.finfo(torch.float32).tiny))
        levels = (states / steps).add_(self.middles).round_()
        levels = torch.clamp(levels, self.least, self.most)
        if len(self.shares) > 1:
            squares = torch.addcmul(states, levels - self.middles, steps, value=-1).square_()
            error = torch.cat([own.sum(-1, keepdim=True) for own in squares.split(self.groups, -1)], -1)
            best = error.argmin(0, keepdim=True)
            scales = scales.gather(0, best)
            levels = levels.gather(0, self._by_channel(best).expand(1, *states.shape))
        # Scales are laid out as their factors are, and bytes are seen only where they lie in their order.
        scale_bytes = scales[0].reshape(-1).view(torch.uint8).view(len(states), -1)
        return self.packing.rows(torch.cat((scale_bytes, levels[0].to(torch.int8).view(torch.uint8)), -1))

    def _by_channel(self, by_group: torch.Tensor) -> torch.Tensor:
        """``[..., groups]`` spread over the channels, or, of one, as it is."""
        return by_group if len(self.groups) == 1 else by_group.index_select(-1, self.owners)


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 that is not below a positive float32, so that no level passes the largest."""
    return ((scales.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


class _Packing(NamedTuple):
    """What the bytes of a row are made of: the most pieces that one has, by the number of bytes.

    A piece is the bits of ``mask`` of a field, moved ``right`` and then ``left``; each is ``[pieces, bytes]`` uint8,
    but for ``fields``, indices into the bytes of all scales and, behind them, the levels of all channels.
    """

    fields: torch.Tensor
    mask: torch.Tensor
    right: torch.Tensor
    left: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[PartCode], device: torch.device) -> _Packing:
        """The table for parts side by side."""
        made: list[list[tuple[int, int, int, int]]] = []
        scale, channel = 0, sum(part.scale_bytes for part in parts)
        for part in parts:
            end = len(made) + part.nbytes
            made += [[(scale + byte, 0xFF, 0, 0)] for byte in range(part.scale_bytes)]
            scale += part.scale_bytes
            for channels, bits in part.segments:
                made += _pieces_of_bytes(channels, bits, channel)
                channel += channels
            made += [[] for _ in range(end - len(made))]
        most = max(map(len, made))
        table = torch.tensor([own + [(0, 0, 0, 0)] * (most - len(own)) for own in made], device=device)
        fields, *moves = table.permute(2, 1, 0)
        return cls(fields.flatten().contiguous(), *(own.to(torch.uint8).contiguous() for own in moves))

    def rows(self, fields: torch.Tensor) -> torch.Tensor:
        """``[N, scale bytes + n]`` uint8 to ``[N, bytes]``."""
        found = fields.index_select(-1, self.fields).view(-1, *self.mask.shape)
        return ((found & self.mask) >> self.right << self.left).sum(1, dtype=torch.uint8)


def _pieces_of_bytes(channels: int, bits: int, first: int) -> list[list[tuple[int, int, int, int]]]:
    """Of every byte of a segment whose levels are the fields from ``first`` on, the pieces as `_Packing` has them."""
    made: list[list[tuple[int, int, int, int]]] = [[] for _ in range(packed_bytes(channels, bits))]
    run, ranges = ranges_of_levels(channels, bits)
    for index, pieces in enumerate(ranges):
        for place in range(max(min(run, channels - index * run), 0)):
            for piece in pieces:
                mask = (1 << piece.width) - 1 << piece.in_level
                made[piece.run * run + place].append((first + index * run + place, mask, piece.in_level, piece.in_byte))
    return made
