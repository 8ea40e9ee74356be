"""Gemma 3's text model: `Gemma3ForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

from transformers import Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RotaryEmbedding
from typing_extensions import override

from ..layers import AttentionGeometry
from .gemma2 import Gemma2Source
from .normed import NormedSource
from .rotary_by_layer_type import RotaryByLayerType


class Gemma3Source(RotaryByLayerType, NormedSource, Gemma2Source):
    """As Gemma 2; query and key norms, and other rotary parameters in layers with a window than in those without."""

    model_type = "gemma3_text"
    causal_lm = Gemma3ForCausalLM
    decoder_layer_class = Gemma3DecoderLayer
    rotary_class = Gemma3RotaryEmbedding
    mla_name = "Gemma3MLA"
    models = "Gemma 3 1B, text models of the larger ones"

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        # Its attention is not given attn_logit_softcapping.
        return replace(super().geometry(layer), softcap=None)
