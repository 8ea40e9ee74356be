"""GPT-NeoX and Pythia: `GPTNeoXForCausalLM`."""

from __future__ import annotations

from torch import Tensor
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from typing_extensions import override

from .base import SourceModel


class GPTNeoXSource(SourceModel):
    """Multi-head attention from one projection, a part of the channels rotated, a block beside the MLP or before it."""

    model_type = "gpt_neox"
    causal_lm = GPTNeoXForCausalLM
    decoder_layer_class = GPTNeoXLayer
    rotary_class = GPTNeoXRotaryEmbedding
    mla_name = "GPTNeoXMLA"
    models = "GPT-NeoX-20B, Pythia"
    layer_prefix = "gpt_neox.layers.{layer}."
    attention_prefix = "attention."
    embedding = "gpt_neox.embed_in.weight"
    final_norm = "gpt_neox.final_layer_norm"
    ignored = r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    fused_projection = "query_key_value"
    output_projection = "dense"
    rotates_partly = True

    @property
    @override
    def head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    @override
    def split_fused(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Head by head: its query, its key, its value."""
        query, key, value = rows.unflatten(0, (-1, 3, self.head_dim)).unbind(1)
        return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
