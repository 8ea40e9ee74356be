"""What cache layers of codes have in common, whether they grow or are of a fixed size."""

from __future__ import annotations

import torch
from typing_extensions import override

from .coded_states_mla import CodedStates, LatentCodec
from .first_tokens_mla import FirstTokens
from .latent_code_mla import LatentCode
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
    def coded_rows(self) -> torch.Tensor:
        """The rows that the layer holds."""
        raise NotImplementedError

    @property
    @override
    def keys(self) -> torch.Tensor | None:
        return self._states(self.coded_rows)[0].decode() if self.is_initialized else None

    @property
    @override
    def values(self) -> torch.Tensor | None:
        return self._states(self.coded_rows)[1].decode() if self.is_initialized else None

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
