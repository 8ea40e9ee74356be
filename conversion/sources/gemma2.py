"""Gemma 2: `Gemma2ForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding
from typing_extensions import override

from ..layers import AttentionGeometry
from .base import SourceModel


class Gemma2Source(SourceModel):
    """A softcap on scores and on logits, windows in every second layer, a scale and an embedding factor of its own."""

    model_type = "gemma2"
    causal_lm = Gemma2ForCausalLM
    decoder_layer_class = Gemma2DecoderLayer
    rotary_class = Gemma2RotaryEmbedding
    mla_name = "Gemma2MLA"
    models = "Gemma 2"

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        return replace(
            super().geometry(layer),
            softmax_scale=self.config.query_pre_attn_scalar**-0.5,
            softcap=self.config.attn_logit_softcapping,
            output_is_normed=True,
        )

    @override
    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * torch.tensor(self.config.hidden_size**0.5, device=self.device)

    @override
    def logits(self, products: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return products if cap is None else torch.tanh(products / cap) * cap
