"""Continuous batching over latents: Transformers' paged cache holds them as one key/value head of half their width.

Its pages store a key and a value of equal size for every head. A latent with its rotary key, ``r + d_r`` values, fills
exactly one such pair of ``(r + d_r) / 2``: no page is wasted and nothing of the paged cache is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_mla import latent_widths
from .transformers_seams_mla import ContinuousBatchingManager, PagedAttentionCache

SEQUENCE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How functions for packed rows are told where a row's sequences lie."""


class PagedConfigView:
    """A model's configuration as the paged cache must see it; everything but the cache's shape is the original's."""

    num_key_value_heads = 1

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        widths = [sum(latent_widths(config, layer)) for layer in range(config.num_hidden_layers)]
        self.head_dim = -(-max(widths) // 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args, **kwargs) -> PagedConfigView:
        return self


class PagedModelView:
    """A model as the manager must see it while it sizes the pages; the model itself is left alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.config = PagedConfigView(model.config.get_text_config(decoder=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def eval(self) -> PagedModelView:
        self._model.eval()
        return self


class PagedLatentCache(PagedAttentionCache):
    """Transformers' pages, written and read in latents and rotary keys."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new tokens to the pages and reads back all that they may attend to.

        Args:
            key_states, value_states: latents ``[1, 1, n, r]`` and rotary keys ``[1, 1, n, d_r]``.
            kwargs: the attention's further arguments, among them the indices to read and write. The bounds of the
                packed sequences are taken out: the mask tells them apart.

        Returns:
            ``[1, 1, T, r]`` and ``[1, 1, T, d_r]``, views of one tensor.
        """
        rank, width = key_states.shape[-1], key_states.shape[-1] + value_states.shape[-1]
        rows = torch.cat((key_states, value_states), dim=-1)
        rows = torch.nn.functional.pad(rows, (0, 2 * self.config.head_dim - width))
        first, second = rows.chunk(2, dim=-1)
        rows = torch.cat(super().update(first, second, layer_idx, kwargs), dim=-1)
        for name in SEQUENCE_BOUNDS:
            kwargs.pop(name, None)
        return rows[..., :rank], rows[..., rank:width]


class LatentBatchingManager(ContinuousBatchingManager):
    """Continuous batching for a model with Multi-head Latent Attention."""

    def __init__(self, model: PreTrainedModel, *args, **kwargs) -> None:
        super().__init__(PagedModelView(model), *args, **kwargs)
        self.model = model

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        # `config` of a view is made once, and the model's own changes with its attention.
        model = getattr(model, "_model", model)
        name = model.config._attn_implementation
        if "flash" in name:
            raise ValueError(
                f"Continuous batching over latents reads the cache itself and cannot use {name!r}; load the model "
                "with attn_implementation='sdpa'."
            )
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)

    def _create_batch_processor(self) -> Any:
        model = self.model
        self.model = PagedModelView(model)
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        processor.cache.__class__ = PagedLatentCache
        return processor
