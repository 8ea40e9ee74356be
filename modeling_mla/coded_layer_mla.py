"""What cache layers of codes have in common, whether they grow or are of a fixed size."""

from __future__ import annotations

from abc import abstractmethod

import torch
from typing_extensions import override

from .backend_triton_mla import writes_codes
from .coded_states_mla import CodedStates, LatentCodec
from .first_tokens_mla import FirstTokens
from .latent_code_mla import LatentCode, code_numbers
from .transformers_seams_mla import CacheLayerMixin

_ALIGNMENT = 16
"""Bytes that a kernel loads at once, from multiples of as many."""


def empty_rows(batch: int, capacity: int, code: LatentCode, device: torch.device) -> torch.Tensor:
    """``[batch, capacity, code.nbytes]`` uint8, zeros.

    On accelerators the latents' levels, which lie behind their scales, begin at multiples of 16 bytes.
    """
    size = (batch, capacity, code.nbytes)
    if device.type == "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    before, stride = -code.latent.scale_bytes % _ALIGNMENT, -(-code.nbytes // _ALIGNMENT) * _ALIGNMENT
    room = torch.zeros(before + batch * capacity * stride, dtype=torch.uint8, device=device)
    return room[before:].view(batch, capacity, stride)[..., : code.nbytes]


class CodedLayer(CacheLayerMixin):
    """First base of a layer whose rows are bytes, ``[B, S, code.nbytes]`` uint8; it keeps a few first tokens besides.

    ``keys`` and ``values`` decode all that it holds.

    Attributes:
        visible: None, for no tensor is what `update` returns two views of.
        padding: tokens before each sequence of the prompt that is cached next, where that is known.
    """

    visible = None
    padding: tuple[int, ...] | None = None
    code: LatentCode
    codec: LatentCodec
    first: FirstTokens

    @property
    @abstractmethod
    def coded_rows(self) -> torch.Tensor:
        """The rows that the layer holds."""

    @property
    @override
    def keys(self) -> torch.Tensor | None:
        return self._states(self.coded_rows)[0].decode() if self.is_initialized else None

    @property
    @override
    def values(self) -> torch.Tensor | None:
        return self._states(self.coded_rows)[1].decode() if self.is_initialized else None

    def _write(self, rotated: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor | None, filled: int) -> None:
        """Codes new tokens ``rotated [B, n, r + d_r]`` into ``rows``, and keeps what there is to keep of them.

        They are cached at ``positions [n]``, or, where these are None, from ``filled`` on.
        """
        keeps = positions is not None or filled < self.first.end
        if writes_codes(self.code, rotated):
            from .triton_append_mla import append_codes, append_codes_operator

            append = append_codes_operator if torch.compiler.is_compiling() else append_codes
            count = self.first.count if keeps else 0
            codes = code_numbers(self.code.latent), code_numbers(self.code.rope)
            append(rotated, rows, self.first.rows, self.first.places, positions, filled, count, *codes)
            return
        if positions is None:
            positions = torch.arange(filled, filled + rotated.shape[1], device=rotated.device) if keeps else None
            rows[:, filled : filled + rotated.shape[1]] = self.codec.encode(rotated)
        else:
            rows.index_copy_(1, positions, self.codec.encode(rotated))
        if positions is not None:
            self.first.write(rotated, positions)

    def _states(self, rows: torch.Tensor) -> tuple[CodedStates, CodedStates]:
        return self.codec.states(rows, self.first.rows[:, : self.first.count], self.first.starts, self.first.places)

    def skip_padding(self, padding: tuple[int, ...]) -> None:
        """Is told, before a prompt is cached, how many padded tokens stand before each of its sequences."""
        self.padding = padding

    @override
    def offload(self) -> None:
        super().offload()
        if self.is_initialized:
            self.first.rows = self.first.rows.to("cpu", non_blocking=True)

    @override
    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized and self.first.rows.device != self.device:
            self.first.rows = self.first.rows.to(self.device, non_blocking=True)
