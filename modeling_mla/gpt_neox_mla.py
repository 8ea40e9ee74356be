"""GPT-NeoX and Pythia with Multi-head Latent Attention: attention and MLP may read the same hidden states."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from transformers import Cache, GenerationMixin, GPTNeoXConfig
from transformers.models.gpt_neox import modeling_gpt_neox as body
from typing_extensions import override

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class GPTNeoXMLAConfig(MLAConfigMixin, GPTNeoXConfig):
    """`GPTNeoXConfig` with the fields of `MLAConfigMixin`."""

    model_type = "gpt_neox_mla"
    # A head that is tied to them is split, so embeddings are; Transformers 5.23 leaves them out.
    base_model_tp_plan = mla_tp_plan(
        {"embed_in": "embedding_rowwise"} | GPTNeoXConfig.base_model_tp_plan, attention="attention"
    )


class GPTNeoXMLAttention(MLAttention):
    """`MLAttention` under the name that the body's layers have for the cache."""

    @override
    def forward(self, *args, layer_past: Cache | None = None, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer_past is not None:
            kwargs["cache"] = layer_past
        return super().forward(*args, **kwargs)


class GPTNeoXMLALayer(body.GPTNeoXLayer):
    """GPT-NeoX's layer with `GPTNeoXMLAttention`, beside the MLP or before it, as the configuration says."""

    __init__ = built_with(body.GPTNeoXLayer, GPTNeoXAttention=GPTNeoXMLAttention)


class GPTNeoXMLAPreTrainedModel(MLAPreTrainedMixin, body.GPTNeoXPreTrainedModel):
    """The base of GPT-NeoX's models with MLA: their configuration, and what outputs are recorded from."""

    config: GPTNeoXMLAConfig
    config_class = GPTNeoXMLAConfig
    _no_split_modules = ["GPTNeoXMLALayer"]
    _can_record_outputs = {"hidden_states": GPTNeoXMLALayer, "attentions": GPTNeoXMLAttention}


class GPTNeoXMLAModel(GPTNeoXMLAPreTrainedModel, body.GPTNeoXModel):
    """GPT-NeoX's decoder with `GPTNeoXMLAttention`; a `LatentCache` takes the place of its multi-head one."""

    __init__ = built_with(body.GPTNeoXModel, GPTNeoXLayer=GPTNeoXMLALayer, GPTNeoXRotaryEmbedding=MLARotaryEmbedding)
    forward = with_latent_cache(body.GPTNeoXModel.forward)


class GPTNeoXMLAForCausalLM(GPTNeoXMLAPreTrainedModel, body.GPTNeoXForCausalLM, GenerationMixin):
    """GPT-NeoX's language model on top of `GPTNeoXMLAModel`."""

    __init__ = built_with(body.GPTNeoXForCausalLM, GPTNeoXModel=GPTNeoXMLAModel)


_heads = generic_heads(GPTNeoXMLAPreTrainedModel)
GPTNeoXMLAForSequenceClassification, GPTNeoXMLAForTokenClassification, GPTNeoXMLAForQuestionAnswering = _heads

register_family(GPTNeoXMLAConfig, GPTNeoXMLAModel, GPTNeoXMLAForCausalLM, *_heads)

__all__ = [
    "GPTNeoXMLAConfig",
    "GPTNeoXMLAForCausalLM",
    "GPTNeoXMLAForQuestionAnswering",
    "GPTNeoXMLAForSequenceClassification",
    "GPTNeoXMLAForTokenClassification",
    "GPTNeoXMLAModel",
    "GPTNeoXMLAPreTrainedModel",
]
