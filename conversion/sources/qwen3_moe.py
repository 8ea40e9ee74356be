"""Qwen3's mixture of experts: `Qwen3MoeForCausalLM`."""

from __future__ import annotations

from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

from .qwen3 import Qwen3Source


class Qwen3MoeSource(Qwen3Source):
    """Qwen3's attention with one window for all layers, or none; experts in the layers that are named."""

    model_type = "qwen3_moe"
    causal_lm = Qwen3MoeForCausalLM
    decoder_layer_class = Qwen3MoeDecoderLayer
    rotary_class = Qwen3MoeRotaryEmbedding
    mla_name = "Qwen3MoeMLA"
    models = "Qwen3-30B-A3B, Qwen3-235B-A22B"
