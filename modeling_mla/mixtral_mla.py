"""Mixtral with Multi-head Latent Attention: a sliding window or none, experts in every layer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, MixtralConfig
from transformers.models.mixtral import modeling_mixtral as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class MixtralMLAConfig(MLAConfigMixin, MixtralConfig):
    """`MixtralConfig` with the fields of `MLAConfigMixin`."""

    model_type = "mixtral_mla"
    base_model_tp_plan = mla_tp_plan(MixtralConfig.base_model_tp_plan)


class MixtralMLADecoderLayer(body.MixtralDecoderLayer):
    """Mixtral's decoder layer, whose MLP is a choice of experts, with `MLAttention`."""

    __init__ = built_with(body.MixtralDecoderLayer, MixtralAttention=MLAttention)


class MixtralMLAPreTrainedModel(MLAPreTrainedMixin, body.MixtralPreTrainedModel):
    """The base of Mixtral's models with MLA; their outputs are recorded from router, layer and attention."""

    config: MixtralMLAConfig
    config_class = MixtralMLAConfig
    _no_split_modules = ["MixtralMLADecoderLayer"]
    _can_record_outputs = body.MixtralPreTrainedModel._can_record_outputs | {
        "hidden_states": MixtralMLADecoderLayer,
        "attentions": MLAttention,
    }


class MixtralMLAModel(MixtralMLAPreTrainedModel, body.MixtralModel):
    """Mixtral's decoder with `MLAttention`; one window serves all layers, or there is none."""

    __init__ = built_with(
        body.MixtralModel, MixtralDecoderLayer=MixtralMLADecoderLayer, MixtralRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.MixtralModel.forward)


class MixtralMLAForCausalLM(MixtralMLAPreTrainedModel, body.MixtralForCausalLM, GenerationMixin):
    """Mixtral's language model on top of `MixtralMLAModel`, with the loss that balances its experts."""

    __init__ = built_with(body.MixtralForCausalLM, MixtralModel=MixtralMLAModel)


_heads = generic_heads(MixtralMLAPreTrainedModel)
MixtralMLAForSequenceClassification, MixtralMLAForTokenClassification, MixtralMLAForQuestionAnswering = _heads

register_family(MixtralMLAConfig, MixtralMLAModel, MixtralMLAForCausalLM, *_heads)

__all__ = [
    "MixtralMLAConfig",
    "MixtralMLAForCausalLM",
    "MixtralMLAForQuestionAnswering",
    "MixtralMLAForSequenceClassification",
    "MixtralMLAForTokenClassification",
    "MixtralMLAModel",
    "MixtralMLAPreTrainedModel",
]
