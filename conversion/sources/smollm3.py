"""SmolLM3: `SmolLM3ForCausalLM`."""

from __future__ import annotations

from torch import Tensor
from transformers import SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3RotaryEmbedding
from typing_extensions import override

from .base import SourceModel


class SmolLM3Source(SourceModel):
    """Layers without rotation; windows in the layers that are named; biases on all projections or on none."""

    model_type = "smollm3"
    causal_lm = SmolLM3ForCausalLM
    decoder_layer_class = SmolLM3DecoderLayer
    rotary_class = SmolLM3RotaryEmbedding
    mla_name = "SmolLM3MLA"
    models = "SmolLM3"

    @override
    def layer_rotary(self, layer: int) -> tuple[Tensor, float]:
        inv_freq, attention_factor = super().layer_rotary(layer)
        return inv_freq if self.config.no_rope_layers[layer] else inv_freq[:0], attention_factor
