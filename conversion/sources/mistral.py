"""Mistral, with a sliding window or without: `MistralForCausalLM`."""

from __future__ import annotations

from transformers import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

from ..errors import SourceError
from .base import SourceModel


class MistralSource(SourceModel):
    """One window for all layers, or none."""

    model_type = "mistral"
    causal_lm = MistralForCausalLM
    decoder_layer_class = MistralDecoderLayer
    rotary_class = MistralRotaryEmbedding
    mla_name = "MistralMLA"

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if getattr(self.config, "layer_types", None) is not None:
            raise SourceError(
                f"{self.location.model} has layer_types, which MistralForCausalLM ignores: it gives every layer the "
                "window of sliding_window; remove them, or name the model that it is (ministral) in model_type."
            )
