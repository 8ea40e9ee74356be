"""Cohere's Command-R: `CohereForCausalLM`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CohereForCausalLM
from transformers.models.cohere.modeling_cohere import CohereDecoderLayer, CohereRotaryEmbedding

from ..layers import AttentionWeights
from .normed import NormedSource
from .rotary_layout import half_split


class CohereSource(NormedSource):
    """Attention and MLP side by side, interleaved rotary pairs, scaled logits; query and key norms where they are set,
    with weights of their own for every head."""

    model_type = "cohere"
    causal_lm = CohereForCausalLM
    decoder_layer_class = CohereDecoderLayer
    rotary_class = CohereRotaryEmbedding
    mla_name = "CohereMLA"

    @property
    def has_norms(self) -> bool:
        return bool(self.config.use_qk_norm)

    def attention(self, layer: int, dtype: torch.dtype | None = None) -> AttentionWeights:
        return half_split(self.geometry(layer), super().attention(layer, dtype))

    def logits(self, products: Tensor) -> Tensor:
        return products * self.config.logit_scale
