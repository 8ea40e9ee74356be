"""Qwen2's mixture of experts, Qwen1.5-MoE too, with Multi-head Latent Attention."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen2MoeConfig
from transformers.models.qwen2_moe import modeling_qwen2_moe as body

from .attention_mla import MLAttention
from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAPreTrainedMixin, built_with, generic_heads, register_family, with_latent_cache
from .rope_mla import MLARotaryEmbedding
from .tensor_parallel_plan_mla import mla_tp_plan


@strict
class Qwen2MoeMLAConfig(MLAConfigMixin, Qwen2MoeConfig):
    """`Qwen2MoeConfig` with the fields of `MLAConfigMixin`."""

    model_type = "qwen2_moe_mla"
    base_model_tp_plan = mla_tp_plan(Qwen2MoeConfig.base_model_tp_plan)


class Qwen2MoeMLADecoderLayer(body.Qwen2MoeDecoderLayer):
    """Qwen2-MoE's decoder layer, with a shared expert beside those chosen, and `MLAttention`."""

    __init__ = built_with(body.Qwen2MoeDecoderLayer, Qwen2MoeAttention=MLAttention)


class Qwen2MoeMLAPreTrainedModel(MLAPreTrainedMixin, body.Qwen2MoePreTrainedModel):
    """The base of Qwen2-MoE's models with MLA; outputs are recorded from router, layer and attention."""

    config: Qwen2MoeMLAConfig
    config_class = Qwen2MoeMLAConfig
    _no_split_modules = ["Qwen2MoeMLADecoderLayer"]
    _can_record_outputs = body.Qwen2MoePreTrainedModel._can_record_outputs | {
        "hidden_states": Qwen2MoeMLADecoderLayer,
        "attentions": MLAttention,
    }


class Qwen2MoeMLAModel(Qwen2MoeMLAPreTrainedModel, body.Qwen2MoeModel):
    """Qwen2-MoE's decoder with `MLAttention`, with a window in the layers that the configuration names."""

    __init__ = built_with(
        body.Qwen2MoeModel, Qwen2MoeDecoderLayer=Qwen2MoeMLADecoderLayer, Qwen2MoeRotaryEmbedding=MLARotaryEmbedding
    )
    forward = with_latent_cache(body.Qwen2MoeModel.forward)


class Qwen2MoeMLAForCausalLM(Qwen2MoeMLAPreTrainedModel, body.Qwen2MoeForCausalLM, GenerationMixin):
    """Qwen2-MoE's language model on top of `Qwen2MoeMLAModel`, with the loss that balances its experts."""

    __init__ = built_with(body.Qwen2MoeForCausalLM, Qwen2MoeModel=Qwen2MoeMLAModel)


_heads = generic_heads(Qwen2MoeMLAPreTrainedModel)
Qwen2MoeMLAForSequenceClassification, Qwen2MoeMLAForTokenClassification, Qwen2MoeMLAForQuestionAnswering = _heads

register_family(Qwen2MoeMLAConfig, Qwen2MoeMLAModel, Qwen2MoeMLAForCausalLM, *_heads)

__all__ = [
    "Qwen2MoeMLAConfig",
    "Qwen2MoeMLAForCausalLM",
    "Qwen2MoeMLAForQuestionAnswering",
    "Qwen2MoeMLAForSequenceClassification",
    "Qwen2MoeMLAForTokenClassification",
    "Qwen2MoeMLAModel",
    "Qwen2MoeMLAPreTrainedModel",
]
