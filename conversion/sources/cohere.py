"""Cohere's Command-R: `CohereForCausalLM`."""

from __future__ import annotations

from torch import Tensor
from transformers import CohereForCausalLM
from transformers.models.cohere.modeling_cohere import CohereDecoderLayer, CohereRotaryEmbedding
from typing_extensions import override

from .normed import NormedSource


class CohereSource(NormedSource):
    """Attention and MLP side by side, interleaved rotary pairs, scaled logits; query and key norms where they are set.

    The norms have weights of their own for every head.
    """

    model_type = "cohere"
    causal_lm = CohereForCausalLM
    decoder_layer_class = CohereDecoderLayer
    rotary_class = CohereRotaryEmbedding
    mla_name = "CohereMLA"
    models = "Command-R, Command-R+, Aya 23"
    interleaved = True

    @property
    @override
    def has_norms(self) -> bool:
        return bool(self.config.use_qk_norm)

    @override
    def logits(self, products: Tensor) -> Tensor:
        return products * self.config.logit_scale
