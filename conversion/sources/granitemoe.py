"""GraniteMoE: `GraniteMoeForCausalLM`."""

from __future__ import annotations

from transformers import GraniteMoeForCausalLM
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeDecoderLayer, GraniteMoeRotaryEmbedding

from .granite import GraniteSource


class GraniteMoeSource(GraniteSource):
    """Granite's multipliers; experts in every layer."""

    model_type = "granitemoe"
    causal_lm = GraniteMoeForCausalLM
    decoder_layer_class = GraniteMoeDecoderLayer
    rotary_class = GraniteMoeRotaryEmbedding
    mla_name = "GraniteMoeMLA"
    models = "Granite 3 MoE"
