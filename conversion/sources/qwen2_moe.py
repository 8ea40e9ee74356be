"""Qwen2's mixture of experts and Qwen1.5-MoE: `Qwen2MoeForCausalLM`."""

from __future__ import annotations

from transformers import Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer, Qwen2MoeRotaryEmbedding

from .base import SourceModel


class Qwen2MoeSource(SourceModel):
    """Biases on queries, keys and values; windows in the layers that are named; experts and a shared one."""

    model_type = "qwen2_moe"
    causal_lm = Qwen2MoeForCausalLM
    decoder_layer_class = Qwen2MoeDecoderLayer
    rotary_class = Qwen2MoeRotaryEmbedding
    mla_name = "Qwen2MoeMLA"
    models = "Qwen1.5-MoE, Qwen2-57B-A14B"
