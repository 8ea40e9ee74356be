"""Qwen2 and Qwen2.5: `Qwen2ForCausalLM`."""

from __future__ import annotations

from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from .base import SourceModel


class Qwen2Source(SourceModel):
    """Biases on queries, keys and values; a sliding window in the layers that the configuration names."""

    model_type = "qwen2"
    causal_lm = Qwen2ForCausalLM
    decoder_layer_class = Qwen2DecoderLayer
    rotary_class = Qwen2RotaryEmbedding
    mla_name = "Qwen2MLA"
    models = "Qwen2, Qwen2.5"
