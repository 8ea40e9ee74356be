"""Mistral with Multi-head Latent Attention: the sliding window is in mask, cache and both routes."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, MistralConfig
from transformers.models.mistral import modeling_mistral as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class MistralMLAConfig(MLAConfigMixin, MistralConfig):
    """`MistralConfig` with the fields of `MLAConfigMixin`."""

    model_type = "mistral_mla"
    base_model_tp_plan = mla_tp_plan(MistralConfig.base_model_tp_plan)


class MistralMLADecoderLayer(body.MistralDecoderLayer):
    """Mistral's decoder layer with `MLAttention`, which looks no farther back than Mistral's window."""

    __init__ = built_with(body.MistralDecoderLayer, MistralAttention=MLAttention)


class MistralMLAPreTrainedModel(MLAPreTrainedMixin, body.MistralPreTrainedModel):
    """The base of Mistral's models with MLA: their configuration, and what their outputs are recorded from."""

    config: MistralMLAConfig
    config_class = MistralMLAConfig
    _no_split_modules = ["MistralMLADecoderLayer"]
    _can_record_outputs = {"hidden_states": MistralMLADecoderLayer, "attentions": MLAttention}


class MistralMLAModel(MistralMLAPreTrainedModel, body.MistralModel):
    """Mistral's decoder with `MLAttention`; the `LatentCache` that it makes keeps what the window needs."""

    __init__ = built_with(
        body.MistralModel, MistralDecoderLayer=MistralMLADecoderLayer, MistralRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.MistralModel.forward)


class MistralMLAForCausalLM(MistralMLAPreTrainedModel, body.MistralForCausalLM, GenerationMixin):
    """Mistral's language model on top of `MistralMLAModel`."""

    __init__ = built_with(body.MistralForCausalLM, MistralModel=MistralMLAModel)


_heads = generic_heads(MistralMLAPreTrainedModel)
MistralMLAForSequenceClassification, MistralMLAForTokenClassification, MistralMLAForQuestionAnswering = _heads

register_family(MistralMLAConfig, MistralMLAModel, MistralMLAForCausalLM, *_heads)

__all__ = [
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAForQuestionAnswering",
    "MistralMLAForSequenceClassification",
    "MistralMLAForTokenClassification",
    "MistralMLAModel",
    "MistralMLAPreTrainedModel",
]
