"""Qwen3: `Qwen3ForCausalLM`, which normalises every head's query and key."""

from __future__ import annotations

from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from .normed import NormedSource


class Qwen3Source(NormedSource):
    """Query and key norms; biases on all projections or on none; a sliding window in the layers that are named."""

    model_type = "qwen3"
    causal_lm = Qwen3ForCausalLM
    decoder_layer_class = Qwen3DecoderLayer
    rotary_class = Qwen3RotaryEmbedding
    mla_name = "Qwen3MLA"
    models = "Qwen3"
