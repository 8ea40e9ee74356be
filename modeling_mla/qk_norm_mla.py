"""Attention for bodies that normalise every head's query and key (Qwen3): normalised first, compressed second.

What is cached may be any function of the hidden state, so the key's norm costs nothing: keys and values of the source
are made, keys are normalised, and ``kv_a_proj_with_mqa`` reads both side by side. A query is normalised a head before
it is mapped to un-rotated and rotated channels.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin, mla_tp_plan
from .transformers_seams_mla import LlamaRMSNorm, init


def normed_mla_tp_plan(body_plan: dict[str, str]) -> dict[str, str]:
    """`mla_tp_plan` with the query's norm and maps split by heads as well; keys are normalised before there are any."""
    return mla_tp_plan(body_plan) | {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.q_head_proj": "local_params",
        # Transformers' name for a stack of matrices that is split into stacks.
        "layers.*.self_attn.q_head_proj.weight": "grouped_gemm",
    }


@dataclass(kw_only=True, repr=False)
class NormedMLAConfigMixin(MLAConfigMixin):
    """`MLAConfigMixin` for bodies with a query and key norm.

    Args:
        qk_norm_head_dim: channels of a head that are normalised together, those of the source's heads.
        qk_norm_key_heads: key heads that are normalised, the source's key/value heads.
        latent_bias: ``kv_a_proj_with_mqa``, which reads normalised keys and values, has a bias.
    """

    qk_norm_head_dim: int = 128
    qk_norm_key_heads: int = 8
    latent_bias: bool = False

    def validate_qk_norm(self) -> None:
        """Raises `ValueError` with field, value and limit."""
        if self.qk_norm_head_dim < 1 or self.qk_norm_key_heads < 1:
            raise ValueError(
                f"qk_norm_head_dim is {self.qk_norm_head_dim} and qk_norm_key_heads {self.qk_norm_key_heads}; "
                "both must be at least 1."
            )
        if self.q_lora_rank is not None:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}; a query norm works on a full q_proj, set None.")


class PerHeadLinear(nn.Module):
    """One linear map a head: ``[B, S, H, in] -> [B, S, H, out]``, weight ``[H, out, in]``."""

    def __init__(self, num_heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))

    def init_mla_weights(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, out_features, in_features = self.weight.shape
        rows = x.reshape(-1, heads, in_features).transpose(0, 1)
        return torch.bmm(rows, self.weight.mT).transpose(0, 1).reshape(*x.shape[:-1], out_features)


class NormedMLAttention(MLAttention):
    """`MLAttention` whose queries and keys are normalised as in the source, before rotation and compression."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm_dim = config.qk_norm_head_dim
        key_width, heads = config.qk_norm_key_heads * self.norm_dim, config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        self.q_proj = nn.Linear(config.hidden_size, heads * self.norm_dim, bias=bias)
        self.q_norm = LlamaRMSNorm(self.norm_dim, eps=config.rms_norm_eps)
        self.q_head_proj = PerHeadLinear(heads, self.norm_dim, self.qk_head_dim)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.k_norm = LlamaRMSNorm(self.norm_dim, eps=config.rms_norm_eps)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        width = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(2 * key_width, width, bias=config.latent_bias)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_proj(hidden_states)
        query = self.q_norm(query.view(*query.shape[:-1], -1, self.norm_dim))
        return self.q_head_proj(query).transpose(1, 2)

    def project_latent(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key = self.k_proj(hidden_states)
        key = self.k_norm(key.view(*key.shape[:-1], -1, self.norm_dim)).flatten(-2)
        return self.kv_a_proj_with_mqa(torch.cat((key, self.v_proj(hidden_states)), dim=-1))
