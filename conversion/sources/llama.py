"""Llama 2 and 3.x, SmolLM2, TinyLlama, Yi: `LlamaForCausalLM`."""

from __future__ import annotations

from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from typing_extensions import override

from ..errors import SourceError
from .base import SourceModel


class LlamaSource(SourceModel):
    """Grouped-query attention, full rotary keys, biases on all projections or on none."""

    model_type = "llama"
    causal_lm = LlamaForCausalLM
    decoder_layer_class = LlamaDecoderLayer
    rotary_class = LlamaRotaryEmbedding
    mla_name = "LlamaMLA"
    models = "Llama 2 and 3, SmolLM2, TinyLlama, Yi"

    @override
    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.config.pretraining_tp != 1:
            raise SourceError(
                f"{self.location.model} has pretraining_tp {self.config.pretraining_tp}: its results are summed in "
                "slices, which Transformers no longer does; set it to 1 in config.json."
            )
