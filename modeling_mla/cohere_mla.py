"""Cohere's Command-R with Multi-head Latent Attention: rotation in float32, query and key norms where they are set."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CohereConfig, GenerationMixin
from transformers.models.cohere import modeling_cohere as body
from typing_extensions import override

from .attention_mla import MLAttention
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .qk_norm_mla import NormedMLAConfigMixin, NormedMLAttention, normed_mla_tp_plan
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class CohereMLAConfig(NormedMLAConfigMixin, CohereConfig):
    """`CohereConfig` with the fields of `NormedMLAConfigMixin`, whose two are None without ``use_qk_norm``."""

    model_type = "cohere_mla"
    attribute_map = CohereConfig.attribute_map | {"rms_norm_eps": "layer_norm_eps"}
    qk_norm_head_dim: int | None = None
    qk_norm_key_heads: int | None = None

    def __post_init__(self, **kwargs) -> None:
        plan = CohereConfig.base_model_tp_plan
        normed = self.use_qk_norm
        self.base_model_tp_plan = normed_mla_tp_plan(plan, norm_spans_heads=True) if normed else mla_tp_plan(plan)
        super().__post_init__(**kwargs)


class CohereMLAttention(MLAttention):
    """`MLAttention` that rotates in float32, as Cohere does."""

    rotary_dtype = torch.float32


class NormedCohereMLAttention(NormedMLAttention):
    """`NormedMLAttention` with Cohere's layer norms, whose weights differ by head; it rotates in float32."""

    rotary_dtype = torch.float32
    norm_spans_heads = True

    @override
    def make_norm(self, heads: int) -> nn.Module:
        return body.CohereLayerNorm(hidden_size=(heads, self.norm_dim), eps=self.config.layer_norm_eps)


def cohere_attention(config: CohereMLAConfig, layer_idx: int) -> MLAttention:
    """With norms or without, as the configuration says."""
    return (NormedCohereMLAttention if config.use_qk_norm else CohereMLAttention)(config, layer_idx)


class CohereMLADecoderLayer(body.CohereDecoderLayer):
    """Cohere's decoder layer, whose attention and MLP read the same input, with what `cohere_attention` makes."""

    __init__ = built_with(body.CohereDecoderLayer, CohereAttention=cohere_attention)


class CohereMLAPreTrainedModel(MLAPreTrainedMixin, body.CoherePreTrainedModel):
    """The base of Cohere's models with MLA: their configuration, and what their outputs are recorded from."""

    config: CohereMLAConfig
    config_class = CohereMLAConfig
    _no_split_modules = ["CohereMLADecoderLayer"]
    _can_record_outputs = {"hidden_states": CohereMLADecoderLayer, "attentions": MLAttention}


class CohereMLAModel(CohereMLAPreTrainedModel, body.CohereModel):
    """Cohere's decoder with MLA; where `use_qk_norm` is set, its `LatentCache` comes of normalised keys."""

    __init__ = built_with(
        body.CohereModel, CohereDecoderLayer=CohereMLADecoderLayer, CohereRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.CohereModel.forward)


class CohereMLAForCausalLM(CohereMLAPreTrainedModel, body.CohereForCausalLM, GenerationMixin):
    """Cohere's language model on top of `CohereMLAModel`; it scales its logits."""

    __init__ = built_with(body.CohereForCausalLM, CohereModel=CohereMLAModel)


_heads = generic_heads(CohereMLAPreTrainedModel)
CohereMLAForSequenceClassification, CohereMLAForTokenClassification, CohereMLAForQuestionAnswering = _heads

register_family(CohereMLAConfig, CohereMLAModel, CohereMLAForCausalLM, *_heads)

__all__ = [
    "CohereMLAConfig",
    "CohereMLAForCausalLM",
    "CohereMLAForQuestionAnswering",
    "CohereMLAForSequenceClassification",
    "CohereMLAForTokenClassification",
    "CohereMLAModel",
    "CohereMLAPreTrainedModel",
]
