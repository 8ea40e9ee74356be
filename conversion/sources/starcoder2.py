"""StarCoder2: `Starcoder2ForCausalLM`."""

from __future__ import annotations

from transformers import Starcoder2ForCausalLM
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2DecoderLayer, Starcoder2RotaryEmbedding

from .base import SourceModel


class Starcoder2Source(SourceModel):
    """One window for all layers, or none; biases on all projections or on none; layer norms."""

    model_type = "starcoder2"
    causal_lm = Starcoder2ForCausalLM
    decoder_layer_class = Starcoder2DecoderLayer
    rotary_class = Starcoder2RotaryEmbedding
    mla_name = "Starcoder2MLA"
    models = "StarCoder2"
