"""Continuous batching over latents: Transformers' paged cache holds them as one key/value head of half their width.

Its pages store a key and a value of equal size for every head. A latent with its rotary key, ``r + d_r`` values, fills
exactly one such pair of ``(r + d_r) / 2``: no page is wasted and nothing of the paged cache is changed. Of a code a
page holds the bytes, in the guise of so many of the model's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_mla import layer_code
from .latent_code_mla import LatentCode, code_for
from .paged_codes_mla import PagedCodes
from .transformers_seams_mla import ContinuousBatchingManager, PagedAttentionCache

SEQUENCE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How functions for packed rows are told where a row's sequences lie."""


class PagedConfigView:
    """A model's configuration as the paged cache must see it; everything but the cache's shape is the original's."""

    num_key_value_heads = 1

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self._config, self._latent_bits = config, model.latent_bits
        if hasattr(config, "layer_kv_lora_rank"):
            layers = range(config.num_hidden_layers)
            widths = [(config.layer_kv_lora_rank(layer), config.layer_qk_rope_head_dim(layer)) for layer in layers]
        else:
            widths = [(config.kv_lora_rank, config.qk_rope_head_dim)]
        codes = [self.layer_code(layer, *own) for layer, own in enumerate(widths)]
        plain = config.kv_lora_rank + config.qk_rope_head_dim
        values = max(plain if code is None else -(-code.nbytes // model.dtype.itemsize) for code in codes)
        self.head_dim = -(-values // 2)
        self.exact_tokens = max(0 if code is None else code.exact_tokens for code in codes)

    def layer_code(self, layer_idx: int, kv_lora_rank: int, qk_rope_head_dim: int) -> LatentCode | None:
        """The code of a layer of these widths, None where pages hold its latents as they are."""
        code = layer_code(self._config, layer_idx, self._latent_bits)
        return None if code is None else code_for(code, kv_lora_rank, qk_rope_head_dim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args, **kwargs) -> PagedConfigView:
        return self


class PagedModelView:
    """A model as the manager must see it while it sizes the pages; the model itself is left alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.config = PagedConfigView(model)

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
        code = self.config.layer_code(layer_idx, rank, value_states.shape[-1])
        if code is None:
            rows = torch.cat((key_states, value_states), dim=-1)
            rows = self._exchange(rows, layer_idx, kwargs)[..., :width]
        else:
            coded = self._coded_layer(code, layer_idx, key_states)
            rows = coded.exchange(key_states[0, 0], value_states[0, 0], self._exchange, layer_idx, kwargs)
        for name in SEQUENCE_BOUNDS:
            kwargs.pop(name, None)
        return rows[..., :rank], rows[..., rank:]

    def _exchange(self, rows: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]) -> torch.Tensor:
        """Writes rows ``[1, 1, n, values]`` to the pages; returns all that are to be read, ``[1, 1, T, values]``."""
        rows = torch.nn.functional.pad(rows, (0, 2 * self.config.head_dim - rows.shape[-1]))
        first, second = rows.chunk(2, dim=-1)
        return torch.cat(super().update(first, second, layer_idx, kwargs), dim=-1)

    def _coded_layer(self, code: LatentCode, layer_idx: int, like: torch.Tensor) -> PagedCodes:
        layers: dict[int, PagedCodes] = self.__dict__.setdefault("coded_layers", {})
        if layer_idx not in layers:
            layers[layer_idx] = PagedCodes(code, self.layer_to_allocator[layer_idx], like.dtype, like.device)
        return layers[layer_idx]

    def perform_cache_copy(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        super().perform_cache_copy(copy_src_and_dst)
        for layer in self.__dict__.get("coded_layers", {}).values():
            layer.copy_blocks(*copy_src_and_dst.get(layer.allocator.layer_type, ([], [])))


class LatentBatchingManager(ContinuousBatchingManager):
    """Continuous batching for a model with Multi-head Latent Attention."""

    def __init__(self, model: PreTrainedModel, *args, **kwargs) -> None:
        super().__init__(PagedModelView(model), *args, **kwargs)
        self.model = model
        kept, paging = PagedConfigView(model).exact_tokens, self.continuous_batching_config
        if kept > paging.page_size:
            raise ValueError(
                f"page_size is {paging.page_size}, and the latent code keeps {kept} first tokens exact; set page_size "
                f"to at least {kept}."
            )
        if kept and paging.cpu_offload_space != 0:
            raise ValueError(
                f"cpu_offload_space is {paging.cpu_offload_space}, and the {kept} first tokens that the latent code "
                "keeps exact stay beside the pages; set cpu_offload_space=0, or cache uncoded (latent_bits=16)."
            )

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
