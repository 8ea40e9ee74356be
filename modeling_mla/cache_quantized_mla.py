"""The latent cache in int8: the latents by groups of channels, the rotary keys as they are."""

from __future__ import annotations

import torch

from .cache_layers_mla import LatentLayer

_GROUP = 128
"""Channels that share a scale."""


def quantize_latents(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 by groups of 128 channels, one float16 scale a token and group.

    Args:
        latents: ``[..., r]``.

    Returns:
        Codes ``[..., r]`` int8, scales ``[..., ceil(r / 128)]`` float16.
    """
    groups = -(-latents.shape[-1] // _GROUP)
    padded = torch.nn.functional.pad(latents.float(), (0, groups * _GROUP - latents.shape[-1]))
    padded = padded.unflatten(-1, (groups, _GROUP))
    # Rounded up to a float16, so that the largest code never passes 127.
    scales = (padded.abs().amax(-1) / 127).clamp(2**-24, torch.finfo(torch.float16).max)
    scales = (scales * (1 + 2**-10)).to(torch.float16)
    codes = (padded / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten(-2)[..., : latents.shape[-1]], scales


def dequantize_latents(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize_latents`, up to rounding."""
    expanded = scales.to(dtype).repeat_interleave(_GROUP, dim=-1)[..., : codes.shape[-1]]
    return codes.to(dtype) * expanded


class QuantizedLatentLayer(LatentLayer):
    """A `LatentLayer` whose buffer holds bytes: int8 codes, float16 scales, then the rotary key.

    The rotary key keeps the precision of bfloat16 or better, for its outliers do not survive eight bits (SnapMLA,
    arXiv 2602.10718); float32 models store it as bfloat16. A row of rank 512 and rotary width 64 takes 648 bytes
    where bfloat16 takes 1152.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_lora_rank, self.qk_rope_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.rope_dtype = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        self._scale_bytes = 2 * -(-self.kv_lora_rank // _GROUP)
        width = self.kv_lora_rank + self._scale_bytes + 2 * self.qk_rope_head_dim
        # Two-byte fields start at even offsets.
        self._pad = self.kv_lora_rank % 2
        self.buffer = torch.empty(
            key_states.shape[0], self.capacity, width + self._pad, dtype=torch.int8, device=self.device
        )
        self.is_initialized = True

    def _pack(self, key_states: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
        codes, scales = quantize_latents(key_states[:, 0])
        rotary = value_states[:, 0].to(self.rope_dtype).contiguous()
        codes = torch.nn.functional.pad(codes, (0, self._pad))
        return torch.cat((codes, scales.contiguous().view(torch.int8), rotary.view(torch.int8)), dim=-1)

    def _unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, S, r + d_r]`` in the model's dtype."""
        start = self.kv_lora_rank + self._pad
        codes = rows[..., : self.kv_lora_rank]
        scales = rows[..., start : start + self._scale_bytes].contiguous().view(torch.float16)
        rotary = rows[..., start + self._scale_bytes :].contiguous().view(self.rope_dtype)
        latents = rows.new_empty(*rows.shape[:2], self.kv_lora_rank + self.qk_rope_head_dim, dtype=self.dtype)
        latents[..., : self.kv_lora_rank] = dequantize_latents(codes, scales, self.dtype)
        latents[..., self.kv_lora_rank :] = rotary
        return latents

    @property
    def visible(self) -> torch.Tensor | None:
        return None

    @property
    def keys(self) -> torch.Tensor | None:
        return self._halves(self._unpack(self.stored))[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        return self._halves(self._unpack(self.stored))[1] if self.is_initialized else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `LatentLayer.update`; returns what the cache holds, dequantised, the new tokens included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_tokens = key_states.shape[-2]
        self._make_room(new_tokens)
        self.buffer[:, self.filled : self.filled + new_tokens] = self._pack(key_states, value_states)
        self._count(new_tokens)
        return self._halves(self._unpack(self.stored))
