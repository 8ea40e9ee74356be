"""GLM-4 of 2025: `Glm4ForCausalLM`."""

from __future__ import annotations

from dataclasses import replace

from transformers import Glm4ForCausalLM
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer, Glm4RotaryEmbedding
from typing_extensions import override

from ..layers import AttentionGeometry
from .base import SourceModel


class Glm4Source(SourceModel):
    """A part of the channels rotated, in interleaved pairs; biases on q, k and v; norms behind every block."""

    model_type = "glm4"
    causal_lm = Glm4ForCausalLM
    decoder_layer_class = Glm4DecoderLayer
    rotary_class = Glm4RotaryEmbedding
    mla_name = "Glm4MLA"
    models = "GLM-4-0414"
    interleaved = True
    rotates_partly = True

    @override
    def geometry(self, layer: int) -> AttentionGeometry:
        return replace(super().geometry(layer), output_is_normed=True)
