"""Mixtral, with a sliding window or without: `MixtralForCausalLM`."""

from __future__ import annotations

from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRotaryEmbedding

from .base import SourceModel


class MixtralSource(SourceModel):
    """One window for all layers, or none; experts in every layer."""

    model_type = "mixtral"
    causal_lm = MixtralForCausalLM
    decoder_layer_class = MixtralDecoderLayer
    rotary_class = MixtralRotaryEmbedding
    mla_name = "MixtralMLA"
    models = "Mixtral 8x7B, 8x22B"
