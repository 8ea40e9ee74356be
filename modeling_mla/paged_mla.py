"""Continuous batching over latents: Transformers' paged cache holds them as one key/value head of half their width.

Its pages store a key and a value of equal size for every head. A latent with its rotary key, ``r + d_r`` values, fills
exactly one such pair of ``(r + d_r) / 2``: no page is wasted and nothing of the paged cache is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache


class PagedConfigView:
    """A model's configuration as the paged cache must see it; everything but the cache's shape is the original's."""

    num_key_value_heads = 1

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self.head_dim = -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args, **kwargs) -> PagedConfigView:
        return self


@contextmanager
def _paged_config(model: PreTrainedModel) -> Iterator[None]:
    config = model.config
    model.config = PagedConfigView(config.get_text_config(decoder=True))
    try:
        yield
    finally:
        model.config = config


class LatentBatchingManager(ContinuousBatchingManager):
    """Continuous batching for a model with Multi-head Latent Attention."""

    def __init__(self, model: PreTrainedModel, *args, **kwargs) -> None:
        with _paged_config(model):
            super().__init__(model, *args, **kwargs)

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = True) -> None:
        name = model.config._attn_implementation
        if "flash" in name:
            raise ValueError(
                f"Continuous batching over latents reads the cache itself and cannot use {name!r}; load the model "
                "with attn_implementation='sdpa'."
            )
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)

    def _create_batch_processor(self) -> Any:
        with _paged_config(self.model):
            return super()._create_batch_processor()


def update_paged(
    cache: PagedAttentionCache, kv_c: torch.Tensor, k_pe: torch.Tensor, layer_idx: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new tokens to the pages and reads back all that they may attend to.

    Args:
        kv_c, k_pe: ``[1, 1, n, r]`` and ``[1, 1, n, d_r]``.
        kwargs: the attention function's further arguments, among them the indices to read and write.

    Returns:
        ``[1, 1, T, r]`` and ``[1, 1, T, d_r]``, views of one tensor.
    """
    rank, width = kv_c.shape[-1], kv_c.shape[-1] + k_pe.shape[-1]
    page_width = 2 * cache.config.head_dim
    rows = torch.nn.functional.pad(torch.cat((kv_c, k_pe), dim=-1), (0, page_width - width))
    first, second = rows.chunk(2, dim=-1)
    first, second = cache.update(key_states=first, value_states=second, layer_idx=layer_idx, kwargs=kwargs)
    rows = torch.cat((first, second), dim=-1)
    return rows[..., :rank], rows[..., rank:width]
