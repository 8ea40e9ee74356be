"""Layers of the latent cache of fixed size, plain and coded: one buffer each, written in place."""

from __future__ import annotations

import torch
from typing_extensions import override

from .coded_layer_mla import CodedLayer, empty_rows
from .coded_states_mla import CodedStates, LatentCodec
from .first_tokens_mla import FirstTokens
from .latent_code_mla import LatentCode, code_for
from .transformers_seams_mla import StaticLayer, is_torchdynamo_compiling


class StaticLatentLayer(StaticLayer):
    """One buffer ``latents [B, max_cache_len, kv_lora_rank + qk_rope_head_dim]``, written in place.

    Its widths come from the configuration, not from the first tensors, for early initialisation passes the shape of
    expanded keys.

    Args:
        max_cache_len: tokens that it holds.
        kv_lora_rank: width of the latents.
        qk_rope_head_dim: width of the rotary keys.
    """

    latents: torch.Tensor

    def __init__(self, max_cache_len: int, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        self.max_cache_len = max_cache_len
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        self.is_initialized = False

    @property
    def visible(self) -> torch.Tensor | None:
        """The whole buffer, as `update` returns it in two halves."""
        return self.latents

    @property
    @override
    def keys(self) -> torch.Tensor | None:
        return self.latents[..., : self.kv_lora_rank].unsqueeze(1) if self.is_initialized else None

    @property
    @override
    def values(self) -> torch.Tensor | None:
        return self.latents[..., self.kv_lora_rank :].unsqueeze(1) if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors()) if self.is_initialized else 0

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self._allocate()
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            # CUDA graphs replay from fixed addresses.
            for tensor in (*self._tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _allocate(self) -> None:
        width = self.kv_lora_rank + self.qk_rope_head_dim
        self.latents = torch.zeros((self.batch_size, self.max_cache_len, width), dtype=self.dtype, device=self.device)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """All that depends on the tokens."""
        return (self.latents,)

    def _new_positions(self, new_tokens: int) -> torch.Tensor:
        """``[n]``, where the new tokens are written; counts them."""
        positions = torch.arange(new_tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(new_tokens)
        return positions

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new rows; returns the whole buffer as latents and rotary keys, what is not filled included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = torch.cat((key_states, value_states), dim=-1).squeeze(1)
        self.latents.index_copy_(1, self._new_positions(key_states.shape[-2]), rows)
        latents = self.latents.unsqueeze(1)
        return latents[..., : self.kv_lora_rank], latents[..., self.kv_lora_rank :]

    @override
    def offload(self) -> None:
        if self.is_initialized:
            self.latents = self.latents.to("cpu", non_blocking=True)

    @override
    def prefetch(self) -> None:
        if self.is_initialized and self.latents.device != self.device:
            self.latents = self.latents.to(self.device, non_blocking=True)

    @override
    def reset(self) -> None:
        if self.is_initialized:
            for tensor in self._tensors():
                tensor.zero_()
        self.cumulative_length.zero_()

    @override
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            # In place: the address must not change.
            for tensor in self._tensors():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


class CodedStaticLatentLayer(CodedLayer, StaticLatentLayer):
    """A `StaticLatentLayer` whose ``latents`` are bytes, ``[B, max_cache_len, code.nbytes]`` uint8.

    `update` returns `CodedStates`.
    """

    def __init__(self, code: LatentCode | int, max_cache_len: int, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        super().__init__(max_cache_len, kv_lora_rank, qk_rope_head_dim)
        self.code = code_for(code, kv_lora_rank, qk_rope_head_dim)

    @override
    def _allocate(self) -> None:
        self.codec = LatentCodec(self.code, self.dtype, self.device)
        self.latents = empty_rows(self.batch_size, self.max_cache_len, self.code, self.device)
        count = self.code.exact_tokens
        self.first = FirstTokens(count, self.batch_size, self.codec.width, self.dtype, self.device)

    @override
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.latents, self.first.rows

    @property
    @override
    def coded_rows(self) -> torch.Tensor:
        return self.latents

    @override
    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[CodedStates, CodedStates]:
        """As `StaticLatentLayer.update`; what it returns stands for the whole buffer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotated = self.codec.rotated(key_states[:, 0], value_states[:, 0])
        if self.padding is not None:
            self.first.skip_padding(self.padding, int(self.cumulative_length))
            self.padding = None
        positions = self._new_positions(key_states.shape[-2])
        self._write(rotated, self.latents, positions, 0)
        return self._states(self.latents)

    @override
    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.first.start_at((0,) * self.batch_size)

    @override
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.first.select_starts(beam_idx)
