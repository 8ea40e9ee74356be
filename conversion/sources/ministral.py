"""Ministral: `MinistralForCausalLM`."""

from __future__ import annotations

from transformers import MinistralForCausalLM
from transformers.models.ministral.modeling_ministral import MinistralDecoderLayer, MinistralRotaryEmbedding

from .base import SourceModel


class MinistralSource(SourceModel):
    """Windows in the layers that are named."""

    model_type = "ministral"
    causal_lm = MinistralForCausalLM
    decoder_layer_class = MinistralDecoderLayer
    rotary_class = MinistralRotaryEmbedding
    mla_name = "MinistralMLA"
    models = "Ministral"
