"""Attention for bodies that normalise queries and keys (Qwen3, Gemma 3, OLMo 2): normalised first, compressed second.

What is cached may be any function of the hidden state, so the key's norm costs nothing: keys and values of the source
are made, keys are normalised, and ``kv_a_proj_with_mqa`` reads both side by side. Queries are normalised before each
head is mapped to un-rotated and rotated channels. Norms are the body's own, of one head or of the whole projection.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from typing_extensions import override

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .per_head_linear_mla import PerHeadLinear
from .tensor_parallel_mla import own_heads
from .tensor_parallel_plan_mla import mla_tp_plan
from .transformers_seams_mla import LlamaRMSNorm


def normed_mla_tp_plan(body_plan: dict[str, str], norm_spans_heads: bool = False) -> dict[str, str]:
    """`mla_tp_plan` with the query's norm and maps split by heads as well; keys are normalised before there are any.

    A norm that spans the heads, or has weights of its own for each, needs all of the query in every process.
    """
    plan = mla_tp_plan(body_plan)
    if norm_spans_heads:
        del plan["layers.*.self_attn.q_proj"]
        return plan
    return plan | {"layers.*.self_attn.q_norm": "replicated_with_grad_allreduce"}


@dataclass(kw_only=True, repr=False)
class NormedMLAConfigMixin(MLAConfigMixin):
    """`MLAConfigMixin` for bodies with a query and key norm.

    Args:
        qk_norm_head_dim: channels of a head that is normalised, those of the source's heads; None where a body that
            may normalise does not.
        qk_norm_key_heads: key heads that are normalised, the source's key/value heads.
        latent_bias: ``kv_a_proj_with_mqa``, which reads normalised keys and values, has a bias.
    """

    qk_norm_head_dim: int | None = 128
    qk_norm_key_heads: int | None = 8
    latent_bias: bool = False

    @property
    @override
    def maps_queries_by_head(self) -> bool:
        return self.qk_norm_head_dim is not None

    def validate_qk_norm(self) -> None:
        """Raises `ValueError` with field, value and limit."""
        wanted = getattr(self, "use_qk_norm", True)
        given = [value is not None for value in (self.qk_norm_head_dim, self.qk_norm_key_heads)]
        if given != [wanted, wanted]:
            raise ValueError(
                f"qk_norm_head_dim is {self.qk_norm_head_dim} and qk_norm_key_heads {self.qk_norm_key_heads}; both "
                f"must be {'numbers' if wanted else 'None without use_qk_norm'}."
            )
        if self.qk_norm_head_dim is None or self.qk_norm_key_heads is None:
            return
        if self.qk_norm_head_dim < 1 or self.qk_norm_key_heads < 1:
            raise ValueError(
                f"qk_norm_head_dim is {self.qk_norm_head_dim} and qk_norm_key_heads {self.qk_norm_key_heads}; "
                "both must be at least 1."
            )
        if self.q_lora_rank is not None:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}; a query norm works on a full q_proj, set None.")
        if self.q_head_dim is not None:
            raise ValueError(f"q_head_dim is {self.q_head_dim}; a query norm has qk_norm_head_dim, set None.")


class NormedMLAttention(MLAttention):
    """`MLAttention` whose queries and keys are normalised as in the source, before rotation and compression.

    Attributes:
        norm_spans_heads: a norm needs all heads, or has weights of its own for each.
    """

    norm_spans_heads: ClassVar[bool] = False

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm_dim = config.qk_norm_head_dim
        key_width, heads = config.qk_norm_key_heads * self.norm_dim, config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        self.q_proj = nn.Linear(config.hidden_size, heads * self.norm_dim, bias=bias)
        self.q_norm = self.make_norm(heads)
        self.q_head_proj = PerHeadLinear(heads, self.norm_dim, self.qk_head_dim)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.k_norm = self.make_norm(config.qk_norm_key_heads)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        width = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(2 * key_width, width, bias=config.latent_bias)

    def make_norm(self, heads: int) -> nn.Module:
        """The body's norm of ``heads`` heads."""
        return LlamaRMSNorm(self.norm_dim, eps=self.config.rms_norm_eps)

    def apply_norm(self, norm: nn.Module, projected: torch.Tensor) -> torch.Tensor:
        """``[B, S, heads * d] -> [B, S, heads, d]``."""
        return norm(projected.unflatten(-1, (-1, self.norm_dim)))

    @override
    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.apply_norm(self.q_norm, self.q_proj(hidden_states))
        if self.norm_spans_heads:
            query = own_heads(query, self.kv_b_proj)
        return self.q_head_proj(query).transpose(1, 2)

    @override
    def project_latent(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key = self.apply_norm(self.k_norm, self.k_proj(hidden_states)).flatten(-2)
        return self.kv_a_proj_with_mqa(torch.cat((key, self.v_proj(hidden_states)), dim=-1))
