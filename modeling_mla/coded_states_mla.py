"""Coded latents and rotary keys: how they are written, and what stands for them where they are read.

The attention function gets `CodedStates` where it would get tensors, and reads them tile by tile.
"""

from __future__ import annotations

import torch

from .bit_packing_mla import packed_bytes, unpack_levels
from .code_writer_mla import RowWriter
from .hartley_mla import hartley_matrix
from .latent_code_mla import LatentCode, PartCode


class Codec:
    """Writes and reads one `PartCode` on a device.

    Attributes:
        dtype: of the states that are coded, and of what they are decoded to.
        matrix: ``[n, n]`` orthogonal, applied from the right before coding; None where the code is not rotated.
        writer: of the bytes; None where states are kept in 16 bits.
    """

    def __init__(self, code: PartCode, dtype: torch.dtype, device: torch.device) -> None:
        self.code, self.dtype = code, dtype
        self.exact_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
        self.precision = torch.promote_types(dtype, torch.float32)
        self.matrix = hartley_matrix(code.channels, self.precision, device) if code.rotated else None
        self.matrix_back = hartley_matrix(code.channels, dtype, device).t() if code.rotated else None
        self.groups = torch.tensor(code.groups, dtype=torch.long, device=device)
        self.writer = None if code.is_exact else RowWriter([code], device)

    @property
    def middles(self) -> torch.Tensor:
        """``[n]`` float32, what is taken from every channel's level."""
        assert self.writer is not None
        return self.writer.middles

    def rotate(self, states: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` as they are coded, in float32 or wider where that takes products."""
        return states if self.matrix is None else states.to(self.precision) @ self.matrix

    def rotate_back(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `rotate`, ``[..., n]`` in the dtype of ``states``."""
        if self.matrix is None or self.matrix_back is None:
            return states
        return states @ (self.matrix_back if states.dtype == self.dtype else self.matrix.t().to(states.dtype))

    def encode(self, rotated: torch.Tensor) -> torch.Tensor:
        """``[..., n]``, rotated, to bytes ``[..., code.nbytes]`` uint8: scales, then the levels of every segment."""
        if self.writer is None:
            return rotated.to(self.exact_dtype).contiguous().view(torch.uint8)
        return self.writer.write(rotated)

    def _by_channel(self, scales: torch.Tensor) -> torch.Tensor:
        """``[..., groups]`` spread over the channels, or, of one scale, as it is."""
        return scales if len(self.code.groups) == 1 else scales.repeat_interleave(self.groups, dim=-1)

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., groups]`` bfloat16, as they lie in ``rows [..., code.nbytes]``."""
        return rows[..., : self.code.scale_bytes].view(torch.bfloat16)

    def unpack(self, rows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Writes the levels in ``rows [..., code.nbytes]`` to ``levels [..., n]`` uint8; returns these as int8."""
        start, first = self.code.scale_bytes, 0
        for channels, bits in self.code.segments:
            stop = start + packed_bytes(channels, bits)
            unpack_levels(rows[..., start:stop], bits, levels[..., first : first + channels])
            start, first = stop, first + channels
        return levels.view(torch.int8)

    def tile(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bytes ``[..., code.nbytes]`` as numbers of ``dtype``, still rotated.

        Returns:
            ``[..., n]``, and ``[...]`` by which they have to be multiplied, in float32 or wider; None for one.
        """
        if self.code.is_exact:
            return rows.view(self.exact_dtype).to(dtype), None
        levels = self.unpack(rows, rows.new_empty(*rows.shape[:-1], self.code.channels))
        centred = levels.to(dtype).sub_(self.middles.to(dtype))
        scales = self.scales(rows)
        if scales.shape[-1] > 1:
            return centred.mul_(self._by_channel(scales.to(dtype))), None
        return centred, scales[..., 0].to(torch.promote_types(dtype, torch.float32))

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes ``[..., code.nbytes]`` as states ``[..., n]``, still rotated, in float32 or wider."""
        states, scales = self.tile(rows, self.precision)
        return states if scales is None else states.mul_(scales.unsqueeze(-1))


class CodedStates:
    """Stands for a tensor ``[B, 1, S, n]`` of latents or rotary keys that are cached in codes.

    Args:
        codec: that wrote them.
        rows: ``[B, S, code.nbytes]`` uint8, strided views of a cache.
        exact: ``[B, e, n]``, rotated, which stand in the place of as many rows.
        starts: of every sequence, the place of the first of these rows; before the first place they are left out.
        places: the same ``[B]`` int64 on the device.
    """

    def __init__(
        self,
        codec: Codec,
        rows: torch.Tensor,
        exact: torch.Tensor,
        starts: tuple[int, ...],
        places: torch.Tensor,
    ) -> None:
        self.codec, self.rows, self.exact, self.starts, self.places = codec, rows, exact, starts, places

    @property
    def shape(self) -> torch.Size:
        """``[B, 1, S, n]``."""
        return torch.Size((self.rows.shape[0], 1, self.rows.shape[1], self.codec.code.channels))

    @property
    def dtype(self) -> torch.dtype:
        """What the states are decoded to."""
        return self.codec.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    def narrow(self, dim: int, start: int, length: int) -> CodedStates:
        """As of a tensor, along the tokens. Raises `ValueError` for another dimension than 2."""
        if dim != 2:
            raise ValueError(f"coded states are cut along their tokens, dimension 2, not {dim}; decode them first.")
        starts = tuple(own - start for own in self.starts)
        places = self.places - start if start else self.places
        return CodedStates(self.codec, self.rows[:, start : start + length], self.exact, starts, places)

    def exact_places(self, index: int) -> tuple[slice, slice]:
        """The places of a sequence's exact tokens among its rows, and among ``exact``."""
        start, count, length = self.starts[index], self.exact.shape[1], self.rows.shape[1]
        first, stop = min(max(start, 0), length), min(max(start + count, 0), length)
        return slice(first, stop), slice(first - start, stop - start)

    def rotated(self) -> torch.Tensor:
        """``[B, S, n]`` as they are coded, in float32 or wider, the exact tokens in their places."""
        states, count = self.codec.decode(self.rows), self.exact.shape[1]
        if len(set(self.starts)) == 1:
            places, kept_places = self.exact_places(0)
            states[:, places] = self.exact[:, kept_places]
            return states
        first = max(min(self.starts, default=0), 0)
        stop = min(max(self.starts, default=0) + count, states.shape[1])
        if count and first < stop:
            slots = torch.arange(first, stop, device=self.device) - self.places.unsqueeze(-1)
            kept = ((slots >= 0) & (slots < count)).unsqueeze(-1)
            slots = slots.clamp(0, count - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
            own = self.exact.gather(1, slots).to(states.dtype)
            states[:, first:stop] = torch.where(kept, own, states[:, first:stop])
        return states

    def decode(self) -> torch.Tensor:
        """The tensor ``[B, 1, S, n]``."""
        return self.codec.rotate_back(self.rotated()).to(self.dtype).unsqueeze(1)


class LatentCodec:
    """Writes and reads the rows of one `LatentCode`: latents, then rotary keys."""

    def __init__(self, code: LatentCode, dtype: torch.dtype, device: torch.device) -> None:
        self.latent, self.rope = (Codec(part, dtype, device) for part in (code.latent, code.rope))
        coded = self.latent.writer is not None and self.rope.writer is not None
        self.writer = RowWriter([code.latent, code.rope], device) if coded else None
        self.widths = [code.latent.channels, code.rope.channels]
        self.width = sum(self.widths)

    def rotated(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """``[..., r]`` and ``[..., d_r]`` to ``[..., r + d_r]``, as they are coded."""
        return torch.cat((self.latent.rotate(kv_c), self.rope.rotate(k_pe)), dim=-1)

    def encode(self, rotated: torch.Tensor) -> torch.Tensor:
        """``[..., r + d_r]`` to rows ``[..., code.nbytes]`` uint8."""
        if self.writer is not None:
            return self.writer.write(rotated)
        latent, rope = rotated.split(self.widths, dim=-1)
        return torch.cat((self.latent.encode(latent), self.rope.encode(rope)), dim=-1)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`, up to rounding: ``[..., r + d_r]``, still rotated, in float32 or wider."""
        latent, rope = rows.split([self.latent.code.nbytes, self.rope.code.nbytes], dim=-1)
        return torch.cat((self.latent.decode(latent), self.rope.decode(rope)), dim=-1)

    def states(
        self, rows: torch.Tensor, exact: torch.Tensor, starts: tuple[int, ...], places: torch.Tensor | None = None
    ) -> tuple[CodedStates, CodedStates]:
        """What stands for latents and rotary keys.

        Args:
            rows: ``[B, S, code.nbytes]`` uint8.
            exact: ``[B, e, r + d_r]``, rotated, tokens of the rows as they are.
            starts: as of `CodedStates`.
            places: likewise; made of ``starts`` where it is not there yet.
        """
        if places is None:
            places = torch.tensor(starts, dtype=torch.long, device=rows.device)
        own, rope = rows.split([self.latent.code.nbytes, self.rope.code.nbytes], dim=-1)
        exact_latent, exact_rope = exact.split(self.widths, dim=-1)
        return (
            CodedStates(self.latent, own, exact_latent, starts, places),
            CodedStates(self.rope, rope, exact_rope, starts, places),
        )


def decoded(states: torch.Tensor | CodedStates) -> torch.Tensor:
    """``[B, 1, S, n]`` of a cache that may be coded."""
    return states.decode() if isinstance(states, CodedStates) else states
