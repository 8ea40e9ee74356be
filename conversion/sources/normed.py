"""What families with norms on queries and keys have in common.

The norms are no linear maps, so the source's projections stay, and the conversion begins behind them: its attention
input is the normalised queries, the normalised keys and the values side by side, from which the source's maps merely
select.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from typing_extensions import override

from ..layers import AttentionGeometry, AttentionWeights, MLAWeights
from .base import SourceModel


class NormedSource(SourceModel):
    """A family whose attention has ``q_norm`` and ``k_norm`` behind its projections."""

    @property
    def has_norms(self) -> bool:
        """False where the configuration leaves them out."""
        return True

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        return replace(super().geometry(layer), behind_norms=self.has_norms)

    def normed(self, norm: nn.Module, projected: Tensor) -> Tensor:
        """``[B, S, heads * d]`` through the family's norm; by default of every head."""
        return norm(projected.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    @override
    def attention_maps(self, layer: int, dtype: torch.dtype | None) -> AttentionWeights:
        """The maps behind the norms: selections, and the source's output projection."""
        if not self.has_norms:
            return super().attention_maps(layer, dtype)
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        output = self.tensors.tensor(f"{prefix}o_proj.weight")
        dtype = dtype or torch.promote_types(output.dtype, torch.float32)
        keys = self.config.num_key_value_heads * self.head_dim
        bias = f"{prefix}o_proj.bias"
        select = torch.eye(2 * keys, dtype=dtype)
        return AttentionWeights(
            q=torch.eye(self.head_dim, dtype=dtype).repeat(self.config.num_attention_heads, 1),
            k=select[:keys],
            v=select[keys:],
            o=output.to(dtype),
            o_bias=self.tensors.tensor(bias).to(dtype) if bias in self.tensors.names else None,
        )

    @override
    def attention_input(self, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, (H + 2 n_kv) d]``: queries and keys after their norms, values."""
        states = super().attention_input(module, hidden_states)
        if not self.has_norms:
            return states
        attention: Any = module.get_submodule("self_attn")
        query = self.normed(attention.q_norm, attention.q_proj(states))
        key = self.normed(attention.k_norm, attention.k_proj(states))
        return torch.cat((query, key, attention.v_proj(states)), dim=-1)

    @override
    def replaced(self, name: str) -> int | None:
        """Only the output projection is: the others stay in front of the norms."""
        return super().replaced(name) if ".o_proj." in name or not self.has_norms else None

    @override
    def mla_tensors(
        self, layer: int, weights: MLAWeights, config: PreTrainedConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As the base's; the query map as one matrix a head, ``q_head_proj [H, d_n + d_r, d]``."""
        tensors = super().mla_tensors(layer, weights, config, dtype)
        if not self.has_norms:
            return tensors
        prefix = self.layer_prefix.format(layer=layer) + self.attention_prefix
        by_head = tensors.pop(f"{prefix}q_proj.weight").unflatten(0, (self.config.num_attention_heads, -1))
        tensors[f"{prefix}q_head_proj.weight"] = by_head.contiguous()
        # The source's attention_bias stands for that of its own projections.
        tensors.pop(f"{prefix}q_proj.bias", None)
        if not config.latent_bias:
            tensors.pop(f"{prefix}kv_a_proj_with_mqa.bias", None)
        return tensors

    @override
    def family_fields(self) -> dict[str, Any]:
        """What is kept of the source's attention."""
        if not self.has_norms:
            return {}
        return {
            "attention_bias": self.config.attention_bias,
            "qk_norm_head_dim": self.head_dim,
            "qk_norm_key_heads": self.config.num_key_value_heads,
        }
