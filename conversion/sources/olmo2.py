"""OLMo 2: `Olmo2ForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from transformers import Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2RotaryEmbedding
from typing_extensions import override

from ..layers import AttentionGeometry
from .normed import NormedSource


class Olmo2Source(NormedSource):
    """Query and key norms over all heads together; no norm before the attention, but one behind it."""

    model_type = "olmo2"
    causal_lm = Olmo2ForCausalLM
    decoder_layer_class = Olmo2DecoderLayer
    rotary_class = Olmo2RotaryEmbedding
    mla_name = "Olmo2MLA"
    models = "OLMo 2"
    input_norm = None

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        return replace(super().geometry(layer), output_is_normed=True)

    @override
    def normed(self, norm: nn.Module, projected: Tensor) -> Tensor:
        return norm(projected)
