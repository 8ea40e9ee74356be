"""Qwen3: `Qwen3ForCausalLM`, which normalises every head's query and key.

The norms are no linear maps, so the source's projections stay, and the conversion begins behind them: its attention
input is the normalised queries, the normalised keys and the values side by side, from which the source's maps merely
select.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3RotaryEmbedding

from ..layers import AttentionWeights, MLAWeights
from .base import SourceModel


class Qwen3Source(SourceModel):
    """Query and key norms; biases on all projections or on none; a sliding window in the layers that are named."""

    model_type = "qwen3"
    causal_lm = Qwen3ForCausalLM
    decoder_layer_class = Qwen3DecoderLayer
    rotary_class = Qwen3RotaryEmbedding
    mla_name = "Qwen3MLA"
    latent_bias = False

    def attention(self, layer: int, dtype: torch.dtype | None = None) -> AttentionWeights:
        """The maps behind the norms: selections, and the source's output projection."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        output = self.tensors.tensor(f"{prefix}o_proj.weight")
        dtype = dtype or torch.promote_types(output.dtype, torch.float32)
        queries = self.config.num_attention_heads * self.head_dim
        keys = self.config.num_key_value_heads * self.head_dim
        bias = f"{prefix}o_proj.bias"
        select = torch.eye(2 * keys, dtype=dtype)
        return AttentionWeights(
            q=torch.eye(queries, dtype=dtype),
            k=select[:keys],
            v=select[keys:],
            o=output.to(dtype),
            o_bias=self.tensors.tensor(bias).to(dtype) if bias in self.tensors.names else None,
        )

    def attention_input(self, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, (H + 2 n_kv) d]``: queries and keys after their norms, values."""
        states = super().attention_input(module, hidden_states)
        attention = module.get_submodule("self_attn")
        assert isinstance(attention, Qwen3Attention)
        query = attention.q_norm(attention.q_proj(states).unflatten(-1, (-1, self.head_dim))).flatten(-2)
        key = attention.k_norm(attention.k_proj(states).unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat((query, key, attention.v_proj(states)), dim=-1)

    def replaced(self, name: str) -> int | None:
        """Only the output projection is: the others stay in front of the norms."""
        return super().replaced(name) if ".o_proj." in name else None

    def mla_tensors(
        self, layer: int, weights: MLAWeights, config: PreTrainedConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As the base's; the query map as one matrix a head, ``q_head_proj [H, d_n + d_r, d]``."""
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        tensors = super().mla_tensors(layer, weights, config, dtype)
        heads = self.config.num_attention_heads
        # The heads' maps are the blocks on the diagonal; a head's query depends on no other's.
        blocks = tensors.pop(f"{prefix}q_proj.weight").unflatten(0, (heads, -1)).unflatten(-1, (heads, -1))
        own = torch.arange(heads)
        tensors[f"{prefix}q_head_proj.weight"] = blocks[own, :, own]
        for name in ("q_proj.bias", "kv_a_proj_with_mqa.bias"):
            tensors.pop(prefix + name, None)
        return tensors

    def family_fields(self) -> dict[str, Any]:
        """What is kept of the source's attention."""
        return {
            "attention_bias": self.config.attention_bias,
            "qk_norm_head_dim": self.head_dim,
            "qk_norm_key_heads": self.config.num_key_value_heads,
        }
