"""The latent cache of fixed size, for `torch.compile`, CUDA graphs and `torch.export`."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, StaticCache

from .configuration_mla import latent_widths
from .transformers_seams_mla import (
    STATIC_LAYER_TYPE_MAPPING,
    StaticLayer,
    get_layer_types_and_kwargs,
    is_torchdynamo_compiling,
)


class StaticLatentLayer(StaticLayer):
    """One buffer ``latents [B, max_cache_len, kv_lora_rank + qk_rope_head_dim]``, written in place.

    Args:
        max_cache_len: tokens that it holds.
        kv_lora_rank, qk_rope_head_dim: its widths. They come from the configuration, not from the first tensors,
            for early initialisation passes the shape of expanded keys.
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
    def keys(self) -> torch.Tensor | None:
        return self.latents[..., : self.kv_lora_rank].unsqueeze(1) if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.latents[..., self.kv_lora_rank :].unsqueeze(1) if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer occupies."""
        return self.latents.nbytes if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        width = self.kv_lora_rank + self.qk_rope_head_dim
        self.latents = torch.zeros((self.batch_size, self.max_cache_len, width), dtype=self.dtype, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            # CUDA graphs replay from fixed addresses.
            torch._dynamo.mark_static_address(self.latents)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new rows; returns the whole buffer as latents and rotary keys, what is not filled included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_tokens = key_states.shape[-2]
        positions = torch.arange(new_tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(new_tokens)
        rows = torch.cat((key_states, value_states), dim=-1).squeeze(1)
        self.latents.index_copy_(1, positions, rows)
        latents = self.latents.unsqueeze(1)
        return latents[..., : self.kv_lora_rank], latents[..., self.kv_lora_rank :]

    def offload(self) -> None:
        if self.is_initialized:
            self.latents = self.latents.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.is_initialized and self.latents.device != self.device:
            self.latents = self.latents.to(self.device, non_blocking=True)

    def reset(self) -> None:
        if self.is_initialized:
            self.latents.zero_()
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            # In place: the address must not change.
            self.latents.copy_(self.latents.index_select(0, beam_idx.to(self.latents.device)))


class StaticLatentCache(StaticCache):
    """`StaticCache` over latents; what `generate(cache_implementation="static")` makes.

    Args:
        config: of the model.
        max_cache_len: tokens that every full-attention layer holds.
        offloading: keeps all layers but the current one on the CPU (needs an accelerator with streams).
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, offloading: bool = False) -> None:
        config = config.get_text_config(decoder=True)
        layers = []
        for index, (layer_type, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=False)):
            if layer_type == "full_attention":
                layer = StaticLatentLayer(max_cache_len, *latent_widths(config, index))
            else:
                layer = STATIC_LAYER_TYPE_MAPPING[layer_type](max_cache_len=max_cache_len, **kwargs)
            layers.append(layer)
        super(StaticCache, self).__init__(layers=layers, offloading=offloading)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers occupy."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)
