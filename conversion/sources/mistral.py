"""Mistral, with a sliding window or without: `MistralForCausalLM`."""

from __future__ import annotations

from transformers import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

from .base import SourceModel


class MistralSource(SourceModel):
    """One window for all layers, or none."""

    model_type = "mistral"
    causal_lm = MistralForCausalLM
    decoder_layer_class = MistralDecoderLayer
    rotary_class = MistralRotaryEmbedding
    mla_name = "MistralMLA"
    models = "Mistral 7B, Nemo"
