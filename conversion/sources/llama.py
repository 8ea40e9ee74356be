"""Llama 2 and 3.x, SmolLM2, TinyLlama, Yi: `LlamaForCausalLM`."""

from __future__ import annotations

from functools import cached_property

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ..errors import SourceError
from ..layers import AttentionGeometry
from .base import SourceModel

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class LlamaSource(SourceModel):
    """Grouped-query attention, full rotary keys, biases on all projections or on none."""

    model_type = "llama"
    causal_lm = LlamaForCausalLM
    decoder_layer_class = LlamaDecoderLayer
    rotary_class = LlamaRotaryEmbedding
    mla_name = "LlamaMLA"

    def refuse_unsupported(self) -> None:
        """Frequencies that depend on the sequence length have no fixed table; the others become one."""
        rope = self.config.rope_parameters
        if rope["rope_type"] not in _ROPE_TYPES:
            raise SourceError(
                f"{self.location.model} has rotary scaling {rope['rope_type']!r}, whose frequencies depend on the "
                f"length of the text; supported are {', '.join(_ROPE_TYPES)}."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise SourceError(
                f"{self.location.model} has partial_rotary_factor {rope['partial_rotary_factor']}, which Llama in "
                "Transformers does not apply; remove it from the configuration."
            )
        if self.config.pretraining_tp != 1:
            raise SourceError(
                f"{self.location.model} has pretraining_tp {self.config.pretraining_tp}: its results are summed in "
                "slices, which Transformers no longer does; set it to 1 in config.json."
            )

    @cached_property
    def _frequencies(self) -> tuple[torch.Tensor, float]:
        rotary = LlamaRotaryEmbedding(self.config)
        return rotary.inv_freq.float(), float(rotary.attention_scaling)

    def geometry(self, layer: int) -> AttentionGeometry:
        """The same for every layer."""
        inv_freq, attention_factor = self._frequencies
        return AttentionGeometry(
            hidden_size=self.config.hidden_size,
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            inv_freq=inv_freq,
            softmax_scale=self.config.head_dim**-0.5,
            attention_factor=attention_factor,
        )
