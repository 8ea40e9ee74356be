"""Ministral with Multi-head Latent Attention: windows in the layers that the configuration names."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, MinistralConfig
from transformers.models.ministral import modeling_ministral as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class MinistralMLAConfig(MLAConfigMixin, MinistralConfig):
    """`MinistralConfig` with the fields of `MLAConfigMixin`."""

    model_type = "ministral_mla"
    base_model_tp_plan = mla_tp_plan(MinistralConfig.base_model_tp_plan)


class MinistralMLADecoderLayer(body.MinistralDecoderLayer):
    """Ministral's decoder layer with `MLAttention`, whose window depends on the kind of the layer."""

    __init__ = built_with(body.MinistralDecoderLayer, MinistralAttention=MLAttention)


class MinistralMLAPreTrainedModel(MLAPreTrainedMixin, body.MinistralPreTrainedModel):
    """The base of Ministral's models with MLA: their configuration, and what outputs are recorded from."""

    config: MinistralMLAConfig
    config_class = MinistralMLAConfig
    _no_split_modules = ["MinistralMLADecoderLayer"]
    _can_record_outputs = {"hidden_states": MinistralMLADecoderLayer, "attentions": MLAttention}


class MinistralMLAModel(MinistralMLAPreTrainedModel, body.MinistralModel):
    """Ministral's decoder with `MLAttention`; its `LatentCache` mixes layers with a window and layers without."""

    __init__ = built_with(
        body.MinistralModel, MinistralDecoderLayer=MinistralMLADecoderLayer, MinistralRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.MinistralModel.forward)


class MinistralMLAForCausalLM(MinistralMLAPreTrainedModel, body.MinistralForCausalLM, GenerationMixin):
    """Ministral's language model on top of `MinistralMLAModel`."""

    __init__ = built_with(body.MinistralForCausalLM, MinistralModel=MinistralMLAModel)


_heads = generic_heads(MinistralMLAPreTrainedModel)
MinistralMLAForSequenceClassification, MinistralMLAForTokenClassification, MinistralMLAForQuestionAnswering = _heads

register_family(MinistralMLAConfig, MinistralMLAModel, MinistralMLAForCausalLM, *_heads)

__all__ = [
    "MinistralMLAConfig",
    "MinistralMLAForCausalLM",
    "MinistralMLAForQuestionAnswering",
    "MinistralMLAForSequenceClassification",
    "MinistralMLAForTokenClassification",
    "MinistralMLAModel",
    "MinistralMLAPreTrainedModel",
]
