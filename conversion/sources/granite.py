"""Granite: `GraniteForCausalLM`, whose configuration multiplies scores, embeddings, what a block adds, and logits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import GraniteForCausalLM
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteRotaryEmbedding
from typing_extensions import override

from ..layers import AttentionGeometry
from .base import SourceModel


class GraniteSource(SourceModel):
    """Four multipliers; biases on all projections or on none."""

    model_type = "granite"
    causal_lm = GraniteForCausalLM
    decoder_layer_class = GraniteDecoderLayer
    rotary_class = GraniteRotaryEmbedding
    mla_name = "GraniteMLA"
    models = "Granite 3"

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        scale, output_scale = self.config.attention_multiplier, self.config.residual_multiplier
        return replace(super().geometry(layer), softmax_scale=scale, output_scale=output_scale)

    @override
    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * self.config.embedding_multiplier

    @override
    def logits(self, products: Tensor) -> Tensor:
        return products / self.config.logits_scaling
