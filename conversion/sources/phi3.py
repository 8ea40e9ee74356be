"""Phi-3 and Phi-4: `Phi3ForCausalLM`."""

from __future__ import annotations

from transformers import Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RotaryEmbedding

from .base import SourceModel


class Phi3Source(SourceModel):
    """Queries, keys and values from one projection; a part of the channels rotated, by two sets of frequencies."""

    model_type = "phi3"
    causal_lm = Phi3ForCausalLM
    decoder_layer_class = Phi3DecoderLayer
    rotary_class = Phi3RotaryEmbedding
    mla_name = "Phi3MLA"
    models = "Phi-3, Phi-4, Phi-4-mini"
    fused_projection = "qkv_proj"
    rotates_partly = True
