"""gpt-oss: `GptOssForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding
from typing_extensions import override

from ..layers import AttentionWeights
from .base import SourceModel


class GptOssSource(SourceModel):
    """Attention sinks, biases on all projections, windows in every second layer, experts.

    Its releases are stored in MXFP4, which is refused with every other packed form; Transformers' `dequantize` makes
    bfloat16 of it.
    """

    model_type = "gpt_oss"
    causal_lm = GptOssForCausalLM
    decoder_layer_class = GptOssDecoderLayer
    rotary_class = GptOssRotaryEmbedding
    mla_name = "GptOssMLA"
    models = "gpt-oss in bfloat16"

    @override
    def attention(self, layer: int, dtype: torch.dtype | None = None) -> AttentionWeights:
        weights = super().attention(layer, dtype)
        sinks = self.tensors.tensor(f"{self.layer_prefix.format(layer=layer)}{self.attention_prefix}sinks")
        return replace(weights, sinks=sinks.to(weights.q))

    @override
    def replaced(self, name: str) -> int | None:
        """None for sinks too, which the converted attention has as well."""
        return None if name.endswith(".sinks") else super().replaced(name)
