"""Multi-head Latent Attention: project, cache, attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from typing_extensions import override

from .attention_functions_mla import eager_attention_forward
from .cache_mla import cached_latents
from .configuration_mla import IDENTITY_NORM_EPS, IDENTITY_NORM_WEIGHT, identity_norm_weight, norm_epsilon
from .latent_attention_mla import LatentAttention
from .per_head_linear_mla import PerHeadLinear
from .rope_extension_mla import rope_extension
from .rope_mla import apply_rotary, layer_angles
from .routes_mla import MLAttentionInterface
from .tensor_parallel_mla import read_by_all_heads
from .transformers_seams_mla import LlamaRMSNorm, PagedAttentionCache, init

ALL_ATTENTION_FUNCTIONS = MLAttentionInterface()


class IdentityRMSNorm(nn.Module):
    """The latent norm of a converted model, which has none.

    Its constants make any engine's RMSNorm over the same tensors a bit-exact identity (in float32 for latents of a root
    mean square below about 180), so that code which expects DeepSeek's latent norm works unchanged; here the identity
    is taken literally. The weight is a constant, not a parameter, and is saved for those engines, in float32 where the
    model is in float16.
    """

    weight: torch.Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Buffer(identity_norm_weight(hidden_size, torch.get_default_dtype()))
        self.variance_epsilon = IDENTITY_NORM_EPS

    def init_mla_weights(self, std: float) -> None:
        """Sets the weight, which is a constant: ``std``, the body's deviation of drawn weights, is not read."""
        init.constant_(self.weight, IDENTITY_NORM_WEIGHT)

    def _constant(self) -> torch.Tensor:
        return identity_norm_weight(len(self.weight), self.weight.dtype, self.weight.device)

    @override
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> IdentityRMSNorm:
        super()._apply(fn, recurse)
        self.weight = nn.Buffer(self._constant())
        return self

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Not what is held: a checkpoint that was saved in float16 before may have brought infinities.
        destination[f"{prefix}weight"] = self._constant()

    @override
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if isinstance(hidden_states, torch.fx.Proxy):
            # An engine reads the graph, and knows a norm by its formula.
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))
        return hidden_states


class MLAttention(LatentAttention):
    """Attention whose cache holds one latent and one shared rotary key a token (DeepSeek-V2, arXiv 2405.04434).

    Parameters bear DeepSeek's names. Dimensions are those of layer ``layer_idx``.

    Attributes:
        rotary_dtype: in which queries and keys are rotated, where the body does not rotate in its own.
    """

    rotary_dtype: torch.dtype | None = None

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.layer_kv_lora_rank(layer_idx)
        self.qk_nope_head_dim = config.layer_qk_nope_head_dim(layer_idx)
        self.qk_rope_head_dim = config.layer_qk_rope_head_dim(layer_idx)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = config.softmax_scale if config.softmax_scale is not None else self.qk_head_dim**-0.5
        extension = rope_extension(config)
        if extension is not None:
            # On the scores, not on cos and sin: channels that lost their rotation were rotated in the source.
            self.scaling *= extension.attention_factor**2
        self.rope_interleave = config.rope_interleave
        self.num_key_value_groups = 1
        self.is_causal = True
        self.sliding_window = layer_window(config, layer_idx)
        self.softcap = config.attention_softcap

        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        self.q_head_dim = config.q_head_dim
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * (self.q_head_dim or self.qk_head_dim), bias=config.q_bias)
            if self.q_head_dim is not None:
                self.q_head_proj = PerHeadLinear(num_heads, self.q_head_dim, self.qk_head_dim)
        else:
            self.q_a_proj = nn.Linear(hidden_size, self.q_lora_rank, bias=config.q_bias)
            self.q_a_layernorm = LlamaRMSNorm(self.q_lora_rank, eps=norm_epsilon(config))
            self.q_b_proj = nn.Linear(self.q_lora_rank, num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=config.kv_a_bias
        )
        if config.latent_norm == "identity":
            self.kv_a_layernorm = IdentityRMSNorm(self.kv_lora_rank)
        else:
            self.kv_a_layernorm = LlamaRMSNorm(self.kv_lora_rank, eps=norm_epsilon(config))
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, hidden_size, bias=config.o_bias)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, H, S, qk_nope_head_dim + qk_rope_head_dim]``, not rotated."""
        if self.q_head_dim is not None:
            heads = self.q_proj(hidden_states).unflatten(-1, (-1, self.q_head_dim))
            return self.q_head_proj(heads).transpose(1, 2)
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query.view(*hidden_states.shape[:-1], -1, self.qk_head_dim).transpose(1, 2)

    def project_latent(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, kv_lora_rank + qk_rope_head_dim]``, neither normalised nor rotated."""
        return self.kv_a_proj_with_mqa(hidden_states)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates ``x [B, heads, S, d]`` as `apply_rotary`, in `rotary_dtype` where that is set."""
        if self.rotary_dtype is None:
            return apply_rotary(x, cos, sin, self.rope_interleave)
        return apply_rotary(x.to(self.rotary_dtype), cos, sin, self.rope_interleave).to(x.dtype)

    @override
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from hidden states to the cache and to themselves.

        Args:
            hidden_states: ``[B, S, D]``.
            position_embeddings: cos and sin from `MLARotaryEmbedding`.
            attention_mask: as Transformers makes it for ``config._attn_implementation``.
            cache: receives the latents and rotary keys of these tokens.
            past_key_values: the same, as releases before 5.24 call it (``cache`` is there continuous batching's).
            **kwargs: further arguments of the cache and of the attention function.

        Returns:
            ``[B, S, D]``, and the attention weights where the attention function gives them.
        """
        query = self.project_query(hidden_states)
        q_nope, q_rope = query.split_with_sizes([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.project_latent(hidden_states)
        kv_c, k_pe = compressed.unsqueeze(1).split_with_sizes([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_c = self.kv_a_layernorm(kv_c)

        cos, sin = layer_angles(
            position_embeddings, self.layer_idx, self.qk_rope_head_dim, self.config.qk_rope_head_dim
        )
        # The key as one more head: of one token, every call costs more than its work.
        rotated = self.rotate(torch.cat((q_rope, k_pe), dim=1), cos, sin)
        q_rope, k_pe = rotated.split_with_sizes([query.shape[1], 1], dim=1)
        k_pe = read_by_all_heads(k_pe, self.kv_b_proj)
        query = torch.cat((q_nope, q_rope), dim=-1)

        # An engine that reads the graph gives neither, and knows only the latter's name.
        cache = past_key_values if cache is None or isinstance(cache, torch.fx.Proxy) else cache
        if cache is not None:
            kv_c, k_pe = cache.update(kv_c, k_pe, self.layer_idx, kwargs=kwargs)
            kwargs["latents"] = cached_latents(cache, self.layer_idx, kv_c.device)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        key, value = self.expand_kv(kv_c, k_pe)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # Engines give heads and their channels in one dimension, or sequences in one with their tokens.
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(attn_output), attn_weights


def layer_window(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None for all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
